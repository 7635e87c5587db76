"""All services on one machine, as processes that live and end together.

inference begins to load → store → registry → gateway → inference is ready → adapters → serve until asked to stop
    → gateway, inference, registry and store ended, one after the other

Of several inference services one may end: the others serve, and it is started again.
"""

import contextlib
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import httpx
from rich.console import Console
from softprompt_api.errors import SoftpromptError
from softprompt_api.rpc.probe import is_serving

from softprompt.adapter_files import LocalAdapter
from softprompt.cli import panel, ports
from softprompt.cli.options import RunOptions, expand_data_dir
from softprompt.cli.phases import Phase, phase
from softprompt.cli.problems import Problem
from softprompt.cli.processes import Child
from softprompt.cli.replicas import Replica, make_replicas
from softprompt.cli.services import GRACE_S, Addresses, command, environment
from softprompt.cli.stopping import Stop
from softprompt.cli.store import EmbeddedStore, locked
from softprompt.inference import InferenceClient
from softprompt.registry import RegistryClient

# Loading a large model from a cold disk takes minutes; a hub may have to be asked for it first.
READY_TIMEOUT_S = 3600.0
_POLL_S = 0.05
_WATCH_S = 0.25


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
        self._children: list[Child] = []
        self._replicas: list[Replica] = []

    def run(self) -> None:
        """Serve until asked to stop. Problem when something does not start, or ends unasked."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self._data_dir))
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
        first, *others = make_replicas(self._options, addresses, self._logs)
        self._start_replica(first)  # before all others: its model takes longest, and it waits for the registry
        if store is not None:
            with self._phase("store") as current:
                self._children.append(store.start())
                current.result = store.description()
        with self._phase("registry") as current:
            registry = self._start("registry", addresses)
            self._await(registry, lambda: is_serving(addresses.registry, 1.0), current)
            current.result = f"gRPC on {addresses.registry}"
        gateway = self._start("gateway", addresses)
        # One after the other: each plans its memory from what those before it have left.
        for replica in (first, *others):
            with self._phase(replica.name) as current:
                if replica is not first:
                    self._start_replica(replica)
                self._await(replica.child, replica.looks_well, current)
                current.result = f"gRPC on {replica.address}, {self._options.model}"
        with self._phase("gateway") as current:
            self._await(gateway, lambda: _is_ready(addresses.gateway_url), current)
            current.result = f"HTTP on {addresses.gateway_url}"

    def _start_replica(self, replica: Replica) -> None:
        self._children.append(replica.start())
        self._replicas.append(replica)

    def _start(self, service: str, addresses: Addresses) -> Child:
        env = environment(service, self._options, addresses)
        child = Child(service, command(service), log=self._logs / f"{service}.log", env=env)
        self._children.append(child)
        return child

    def _await(self, child: Child, ready: Callable[[], bool], current: Phase) -> None:
        while not ready():
            self._check_children()
            if current.elapsed_s > READY_TIMEOUT_S:
                raise Problem(
                    f"{current.name} is not ready after {READY_TIMEOUT_S:.0f} s; its log is in {self._logs}"
                )
            current.tick(lambda: child.log_tail(1))
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
        while not self._stop.wait(_WATCH_S):
            for child in self._children:
                for line in child.new_errors():
                    self._warn(f"{child.name}: {line}")
            for replica in self._replicas:
                if not replica.has_served and replica.runs() and replica.looks_well():
                    self._console.print(f"{replica.name} serves again", highlight=False, markup=False)
            self._check_children()

    def _check_children(self) -> None:
        for index, child in enumerate(self._children):
            code = child.exit_code()
            if code is None:
                continue
            replica = next((one for one in self._replicas if one.child is child), None)
            if replica is None or not replica.is_planned():
                self._tell_end(child, replica, code)
            if replica is not None and replica.is_due():
                self._children[index] = replica.start()

    def _tell_end(self, child: Child, replica: Replica | None, code: int) -> None:
        """Say that a child has ended, and plan its next start; Problem where it must not be missing."""
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        if replica is None or not self._is_replaceable(replica):
            raise Problem(f"{child.name} ended unexpectedly ({how}); its log ends with", detail=child.log_tail())
        pause_s = replica.plan_start()
        when = f" in {pause_s:.0f} s" if pause_s else ""
        self._warn(f"{child.name} ended unexpectedly ({how}); it is started again{when}")

    def _is_replaceable(self, replica: Replica) -> bool:
        """Whether one of several has shown that it can be started, and can be again or others run meanwhile."""
        others = [one for one in self._replicas if one is not replica]
        return (
            self._options.replicas > 1
            and replica.has_ever_served
            and (replica.has_served or any(one.runs() for one in others))
        )

    def _warn(self, line: str) -> None:
        self._console.print(line, style="red", highlight=False, markup=False)

    def _end_all(self) -> None:
        if self._stop.asked():
            # The terminal may be what has gone; where it is a broken pipe, rich ends the program.
            with contextlib.suppress(OSError, SystemExit):
                self._console.print("stopping …")
        # The gateway first, so that what it has taken can be answered; then the replicas, at once; then the rest.
        replicas = [replica.child for replica in self._replicas]
        others = [child for child in self._children if child not in replicas]
        gateway = [child for child in others if child.name == "gateway"]
        for child in gateway:
            child.end(GRACE_S, hurried=self._stop.hurried)
        for child in replicas:
            child.ask_to_end()
        for child in (*replicas, *reversed(others)):
            child.end(GRACE_S, hurried=self._stop.hurried)

    def _phase(self, name: str) -> contextlib.AbstractContextManager[Phase]:
        return phase(name, self._console)


def _is_ready(url: str) -> bool:
    try:
        # Its certificate is for names that clients use: this one may call it by another, and only asks how it is.
        return httpx.get(f"{url}/health/ready", timeout=1.0, trust_env=False, verify=False).is_success
    except httpx.HTTPError:
        return False
