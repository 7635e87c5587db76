"""All services on one machine, as processes that live and end together.

inference begins to load → store → registry → gateway → inference is ready → adapters → serve until asked to stop
    → gateway, inference, registry and store ended, one after the other

A process that ends before all serve ends the start. Afterwards it is started again, while the others go on.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import httpx
from rich.console import Console
from softprompt_api.errors import SoftpromptError
from softprompt_api.rpc.probe import is_serving

from softprompt.adapter_files import LocalAdapter
from softprompt.cli import panel, ports
from softprompt.cli.healing import Service
from softprompt.cli.options import RunOptions, expand_data_dir
from softprompt.cli.phases import Phase, phase
from softprompt.cli.problems import Problem
from softprompt.cli.processes import Child
from softprompt.cli.replicas import make_replicas
from softprompt.cli.services import GRACE_S, Addresses, command, environment
from softprompt.cli.stopping import Stop
from softprompt.cli.store import EmbeddedStore, locked
from softprompt.inference import InferenceClient
from softprompt.registry import RegistryClient

# Loading a large model from a cold disk takes minutes; a hub may have to be asked for it first.
READY_TIMEOUT_S = 3600.0
_POLL_S = 0.05
_WATCH_S = 0.25
_HEALTH_TIMEOUT_S = 1.0
_MIB = 2**20
_LITTLE_SPACE_BYTES = 256 * _MIB


class _Stopped(Exception):
    """Somebody asked to stop while the system was starting."""


class Supervisor:
    """Starts a system, watches it, ends it. Not reusable.

    Args:
        options: what to serve and where.
        adapters: those to register, by name.
        console: where progress, the panel and the services' errors go.
        stop: already listening to signals.
    """

    def __init__(
        self, options: RunOptions, adapters: Mapping[str, LocalAdapter], console: Console, stop: Stop
    ) -> None:
        self._options = options
        self._adapters = adapters
        self._console = console
        self._stop = stop
        self._data_dir = expand_data_dir(options.data_dir)
        self._logs = self._data_dir / "logs"
        self._services: list[Service] = []
        self._replicas: list[Service] = []
        self._is_up = False

    def run(self) -> None:
        """Serve until asked to stop. Problem when something does not start, or ends again and again."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self._data_dir))
            self._warn_of_little_space()
            store = None if self._options.redis_url else EmbeddedStore(self._data_dir, self._logs, self._stop)
            addresses = self._claim_addresses(store)
            stack.callback(self._end_all)
            with contextlib.suppress(_Stopped):
                self._start_all(store, addresses)
                self._register(addresses)
                panel.show(self._console, self._options, addresses, self._logs)
                self._watch()

    def _claim_addresses(self, store: EmbeddedStore | None) -> Addresses:
        options = self._options
        first = options.inference_port
        wanted = range(first, first + options.replicas) if first else [0] * options.replicas
        with ports.Claims() as claims:
            registry_port = claims.claim("127.0.0.1", options.registry_port, "--registry-port")
            inference_ports = [claims.claim("127.0.0.1", port, "--inference-port") for port in wanted]
            return Addresses(
                redis_url=store.url if store else str(options.redis_url),
                registry=f"127.0.0.1:{registry_port}",
                inference=tuple(f"127.0.0.1:{port}" for port in inference_ports),
                gateway_host=options.host,
                gateway_port=claims.claim(options.host, options.port, "--port"),
                gateway_scheme="https" if options.tls_cert else "http",
            )

    def _start_all(self, store: EmbeddedStore | None, addresses: Addresses) -> None:
        self._replicas = make_replicas(self._options, addresses, self._logs)
        first = self._replicas[0]
        self._start(first)  # before all others: its model takes longest, and it waits for the registry
        if store is not None:
            with self._phase("store") as current:
                service = Service("store", store.launch, store.answers)
                self._start(service)
                store.wait_until_loaded(service.child)
                service.looks_well()
                current.result = store.description()
        registry = self._make("registry", addresses, partial(is_serving, addresses.registry, _HEALTH_TIMEOUT_S))
        with self._phase("registry") as current:
            self._start(registry)
            self._await(registry, current)
            current.result = f"gRPC on {addresses.registry}"
        gateway = self._make("gateway", addresses, partial(_is_ready, addresses.gateway_url))
        self._start(gateway)
        # One after the other: each plans its memory from what those before it have left.
        for replica, address in zip(self._replicas, addresses.inference, strict=True):
            with self._phase(replica.name) as current:
                if replica is not first:
                    self._start(replica)
                self._await(replica, current)
                current.result = f"gRPC on {address}, {self._options.model}"
        with self._phase("gateway") as current:
            self._await(gateway, current)
            current.result = f"HTTP on {addresses.gateway_url}"

    def _make(self, name: str, addresses: Addresses, is_serving: Callable[[], bool]) -> Service:
        env = environment(name, self._options, addresses)
        start = partial(Child, name, command(name), log=self._logs / f"{name}.log", env=env)
        return Service(name, start, is_serving)

    def _start(self, service: Service) -> None:
        try:
            service.start()
        except OSError as error:
            raise Problem(f"{service.name} could not be started: {error}") from error
        self._services.append(service)

    def _await(self, service: Service, current: Phase) -> None:
        while not service.looks_well():
            self._check_services()
            if current.elapsed_s > READY_TIMEOUT_S:
                raise Problem(
                    f"{current.name} is not ready after {READY_TIMEOUT_S:.0f} s; its log is in {self._logs}"
                )
            current.tick(lambda: service.child.log_tail(1))
            if self._stop.wait(_POLL_S):
                raise _Stopped

    def _register(self, addresses: Addresses) -> None:
        if not self._adapters:
            return
        with InferenceClient(addresses.inference[0]) as inference:
            # The store may know others, of earlier starts.
            base_model = inference.model().base_model.id
        # A thread of its own, so that a stop need not wait for an upload: without its connection that ends.
        with ThreadPoolExecutor(1) as uploading, RegistryClient(addresses.registry) as registry:
            for name, adapter in self._adapters.items():
                if self._stop.asked():
                    raise _Stopped
                with self._phase("adapter") as current:
                    ensured = uploading.submit(registry.ensure, name, adapter, base_model=base_model)
                    while not wait([ensured], _POLL_S).done:
                        if self._stop.asked():
                            raise _Stopped
                        current.tick(partial(str, name))
                    try:
                        info, is_new = ensured.result()
                    except SoftpromptError as error:
                        raise Problem(f"cannot serve the adapter {name!r}: {error.message}") from error
                    state = "registered" if is_new else "unchanged"
                    if info.digest != adapter.digest:
                        state = "where it was moved back to; the folder's content is a later version"
                    current.result = f"{name}@{info.version}, {info.size}, {state}"

    def _watch(self) -> None:
        self._is_up = True
        while not self._stop.wait(_WATCH_S):
            for service in self._services:
                for line in service.child.new_errors():
                    self._warn(f"{service.name}: {line}")
                service.child.bound_log()
                if not service.has_served and service.runs() and service.looks_well():
                    self._say(f"{service.name} serves again")
            self._check_services()

    def _check_services(self) -> None:
        """See who has ended, and start those whose time has come."""
        for service in self._services:
            if service.is_due():
                self._start_again(service)
            elif not service.is_planned() and not service.runs():
                self._take_end(service)

    def _take_end(self, service: Service) -> None:
        how, reason = service.child.how_it_ended(), service.child.last_error()
        if not self._is_up:
            raise _failed_start(service, how, reason)
        self._plan_start(service, f"ended unexpectedly ({how}{': ' if reason else ''}{reason})")
        self._warn_of_little_space()

    def _start_again(self, service: Service) -> None:
        try:
            service.start()
        except (OSError, Problem) as error:
            self._plan_start(service, f"could not be started ({error})")

    def _plan_start(self, service: Service, what: str) -> None:
        """Say what has become of a service, and when another is started; Problem where that has no sense."""
        pause_s = service.plan_start()
        if service.is_hopeless() and not self._can_go_on_without(service):
            raise Problem(
                f"{service.name} {what}, {service.num_ends} times in a row; its log ends with",
                detail=service.child.log_tail(),
            )
        self._warn(f"{service.name} {what}; it is started again in {pause_s:g} s")

    def _can_go_on_without(self, service: Service) -> bool:
        """Whether requests are answered meanwhile: by other replicas, and without registry and store by all."""
        if service in self._replicas:
            return not all(one.is_hopeless() for one in self._replicas)
        return service.name != "gateway"

    def _warn_of_little_space(self) -> None:
        free = shutil.disk_usage(self._data_dir).free
        if free < _LITTLE_SPACE_BYTES:
            self._warn(
                f"only {free // _MIB} MiB are free on the disk of {self._data_dir}: "
                "when it is full, no adapter can be added"
            )

    def _warn(self, line: str) -> None:
        self._say(line, style="red")

    def _say(self, line: str, style: str | None = None) -> None:
        self._console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    def _end_all(self) -> None:
        if self._stop.asked():
            # The terminal may be what has gone; where it is a broken pipe, rich ends the program.
            with contextlib.suppress(OSError, SystemExit):
                self._console.print("stopping …")
        # The gateway first, so that what it has taken can be answered; then the replicas, at once; then the rest.
        others = [service for service in self._services if service not in self._replicas]
        replicas = [service for service in self._services if service in self._replicas]
        for service in others:
            if service.name == "gateway":
                service.child.end(GRACE_S, hurried=self._stop.hurried)
        for service in replicas:
            service.child.ask_to_end()
        for service in (*replicas, *reversed(others)):
            service.child.end(GRACE_S, hurried=self._stop.hurried)

    def _phase(self, name: str) -> contextlib.AbstractContextManager[Phase]:
        return phase(name, self._console)


def _failed_start(service: Service, how: str, reason: str) -> Problem:
    """What ends a start: where its service has logged a reason, that comes first."""
    end = f"{service.name} ended unexpectedly ({how}); its log ends with"
    tail = service.child.log_tail()
    return Problem(reason, detail=f"{end}\n{tail}") if reason else Problem(end, detail=tail)


def _is_ready(url: str) -> bool:
    try:
        # Its certificate is for names that clients use: this one may call it by another, and only asks how it is.
        return httpx.get(f"{url}/health/ready", timeout=1.0, trust_env=False, verify=False).is_success
    except httpx.HTTPError:
        return False
