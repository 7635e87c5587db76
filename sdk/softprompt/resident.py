"""The adapters of one LLM: which id stands for which content, and which of them are in the engine."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from softprompt_api.composition import role_of
from softprompt_api.errors import InvalidArgument
from softprompt_api.formats import CONFIG_FILE, DEFAULT_MAX_LORA_RANK, ModelShape, Role
from softprompt_api.names import AdapterRef, choose_task, with_task
from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.keys import VirtualIds
from softprompt_inference.engine.messages import DropAdapter

from softprompt.adapter_files import LocalAdapter, check_tensors, find_adapter
from softprompt.requests import AdapterRequest, LoRARequest

_Stamp = tuple[tuple[int, int], ...]
_Request = TypeVar("_Request", bound=AdapterRequest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    name: str
    path: str
    local: LocalAdapter
    stamp: _Stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resident:
    num_virtual_tokens: int
    are_key_values: bool


class ResidentAdapters:
    """Loads adapters when they are first asked for and drops those not asked for longest.

    Soft prompts and LoRAs have one of these each.

    Args:
        engine: where they are loaded.
        limit: how many stay loaded between calls.
        max_lora_rank: highest rank of a LoRA.
    """

    def __init__(self, engine: Engine, limit: int, *, max_lora_rank: int = DEFAULT_MAX_LORA_RANK) -> None:
        self._engine = engine
        self._limit = limit
        self._max_lora_rank = max_lora_rank
        self._known: dict[int, _Known] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()

    def load(self, requests: Iterable[_Request]) -> dict[_Request, str]:
        """What the engine calls each, once it is loaded; no request may be running.

        What is wrong with the files of one is raised before any is loaded.
        """
        known = self._identify_all(dict.fromkeys(requests))
        for request, one in known.items():
            _check_num_virtual_tokens(request, one.local)
        tasks = {request: _task(request, one.local) for request, one in known.items()}
        digests = {request: with_task(one.local.digest, tasks[request]) for request, one in known.items()}
        wanted = {digest: request for request, digest in digests.items()}
        self._forget_failed()
        new = [(digest, request) for digest, request in wanted.items() if digest not in self._resident]
        adapters = [self._read(digest, known[request].local, tasks[request]) for digest, request in new]
        for digest in wanted:
            if digest in self._resident:
                self._resident.move_to_end(digest)
        # The engine has room for no more LoRAs than the limit.
        num_together = len(self._resident) + len(new)
        self._drop(min(num_together - self._limit, num_together - len(wanted)))
        for adapter in adapters:
            self._engine.handle(adapter.load_command())
            if error := self._engine.load_error(adapter.digest):
                raise error
            self._resident[adapter.digest] = _Resident(
                num_virtual_tokens=adapter.num_virtual_tokens, are_key_values=adapter.are_key_values
            )
        # An id is bound to what it stood for only once that was found good.
        self._known.update({request.adapter_id: one for request, one in known.items()})
        return digests

    def assign(self, digest: str, virtual_ids: VirtualIds) -> None:
        """Give a loaded adapter some of these ids, as the engine did of its own."""
        resident = self._resident[digest]
        virtual_ids.assign(digest, resident.num_virtual_tokens, are_key_values=resident.are_key_values)

    def role_of(self, digest: str) -> Role:
        """What a loaded soft prompt gives."""
        return Role.KEY_VALUES if self._resident[digest].are_key_values else Role.EMBEDDINGS

    def trim(self) -> None:
        """Drop the least recently used above the limit; no request may be running."""
        self._drop(len(self._resident) - self._limit)

    def _forget_failed(self) -> None:
        """Those that the engine was given but could not take to the end, or was interrupted at, come anew."""
        for digest in [digest for digest in self._resident if self._engine.load_error(digest)]:
            del self._resident[digest]
            self._engine.handle(DropAdapter(digest=digest))

    def _drop(self, count: int) -> None:
        for _ in range(count):
            digest, _resident = self._resident.popitem(last=False)
            self._engine.handle(DropAdapter(digest=digest))

    def _identify_all(self, requests: Iterable[_Request]) -> dict[_Request, _Known]:
        """What each stands for, also where one call is the first to use an id, and uses it twice."""
        found: dict[_Request, _Known] = {}
        by_id = dict(self._known)
        for request in requests:
            found[request] = by_id[request.adapter_id] = self._identify(request, by_id.get(request.adapter_id))
        return found

    def _identify(self, request: AdapterRequest, known: _Known | None) -> _Known:
        if known is None:
            return _find(request)
        if (known.name, known.path) != (request.name, request.local_path):
            raise InvalidArgument(
                f"adapter id {request.adapter_id} stands for {known.name!r} at {known.path}, "
                f"not for {request.name!r} at {request.local_path}; give each adapter an id of its own",
                field=_field(request, "id"),
            )
        if _stamp(known.local) == known.stamp:
            return known
        found = _find(request)
        if found.local.digest != known.local.digest:
            raise InvalidArgument(
                f"the files of {known.name!r} have changed since id {request.adapter_id} was first used; "
                "give the changed adapter another id",
                field=_field(request, "id"),
            )
        return found

    def _read(self, digest: str, local: LocalAdapter, task: int | None) -> Adapter:
        info = self._engine.info
        shape = ModelShape(
            hidden_size=info.hidden_size,
            num_layers=info.num_layers,
            num_kv_heads=info.num_kv_heads,
            head_dim=info.head_dim,
            max_virtual_tokens=info.max_virtual_tokens,
            max_lora_rank=self._max_lora_rank,
            dtype=info.dtype,
            no_key_values=info.no_key_values,
        )
        return Adapter.read(digest, local.spec, check_tensors(local, shape), task=task, dtype=info.dtype)


def _task(request: AdapterRequest, local: LocalAdapter) -> int | None:
    ref = AdapterRef(name=request.name, task=request.task)
    return choose_task(ref, local.spec.num_tasks, field="prompt_adapter_task")


def _check_num_virtual_tokens(request: AdapterRequest, local: LocalAdapter) -> None:
    told, found = getattr(request, "prompt_adapter_num_virtual_tokens", None), local.spec.num_virtual_tokens
    if told is not None and told != found:
        raise InvalidArgument(
            f"prompt_adapter_num_virtual_tokens is {told}, and {request.name!r} has {found}; leave it out",
            field="prompt_adapter_num_virtual_tokens",
        )


def _find(request: AdapterRequest) -> _Known:
    local = find_adapter(request.local_path)
    is_lora = role_of(local.spec.kind) is Role.LORA
    if is_lora != isinstance(request, LoRARequest):
        argument = "lora_request" if is_lora else "prompt_adapter_request"
        raise InvalidArgument(
            f"{request.name!r} is a {local.spec.kind} adapter; give it as {argument}",
            field=_field(request, "path"),
        )
    return _Known(name=request.name, path=request.local_path, local=local, stamp=_stamp(local))


def _stamp(local: LocalAdapter) -> _Stamp:
    """Modification times and sizes: they change whenever one of the files is written again."""
    tensors = local.files.tensors_path
    statuses = [path.stat() for path in (tensors, tensors.with_name(CONFIG_FILE)) if path.exists()]
    return tuple((status.st_mtime_ns, status.st_size) for status in statuses)


def _field(request: AdapterRequest, what: str) -> str:
    """The field of a request that holds its id, or its path."""
    if isinstance(request, LoRARequest):
        return {"id": "lora_int_id", "path": "lora_path"}[what]
    return {"id": "prompt_adapter_id", "path": "prompt_adapter_local_path"}[what]
