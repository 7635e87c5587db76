"""The adapters of one LLM: which id stands for which content, and which of them are in the engine."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from softprompt_api.errors import InvalidArgument
from softprompt_api.formats import CONFIG_FILE, read_rows
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.messages import DropAdapter, LoadAdapter

from softprompt.adapter_files import LocalAdapter, check_tensors, find_adapter
from softprompt.requests import PromptAdapterRequest

_Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    name: str
    path: str
    local: LocalAdapter
    stamp: _Stamp


class ResidentAdapters:
    """Loads adapters when they are first asked for and drops those not asked for longest.

    Args:
        engine: where they are loaded.
        limit: how many stay loaded between calls.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._known: dict[int, _Known] = {}
        self._num_virtual_tokens: OrderedDict[str, int] = OrderedDict()

    def load(self, requests: Iterable[PromptAdapterRequest]) -> dict[PromptAdapterRequest, str]:
        """The digest of each, after it was loaded; what is wrong with one is raised before any is loaded."""
        known = {request: self._identify(request) for request in dict.fromkeys(requests)}
        locals_by_digest = {one.local.digest: one.local for one in known.values()}
        new = [local for digest, local in locals_by_digest.items() if digest not in self._num_virtual_tokens]
        for command in [self._read(local) for local in new]:
            self._engine.handle(command)
            self._num_virtual_tokens[command.digest] = command.num_virtual_tokens
        for digest in locals_by_digest:
            self._num_virtual_tokens.move_to_end(digest)
        # An id is bound to what it stood for only once that was found good.
        self._known.update({request.adapter_id: one for request, one in known.items()})
        return {request: one.local.digest for request, one in known.items()}

    def num_virtual_tokens(self, digest: str) -> int:
        """Size of a loaded adapter."""
        return self._num_virtual_tokens[digest]

    def trim(self) -> None:
        """Drop the least recently used above the limit; no request may be running."""
        while len(self._num_virtual_tokens) > self._limit:
            digest, _ = self._num_virtual_tokens.popitem(last=False)
            self._engine.handle(DropAdapter(digest=digest))

    def _identify(self, request: PromptAdapterRequest) -> _Known:
        known = self._known.get(request.adapter_id)
        if known is None:
            return _find(request)
        if (known.name, known.path) != (request.name, request.local_path):
            raise InvalidArgument(
                f"adapter id {request.adapter_id} stands for {known.name!r} at {known.path}, "
                f"not for {request.name!r} at {request.local_path}; give each adapter an id of its own",
                field="prompt_adapter_id",
            )
        if _stamp(known.local) == known.stamp:
            return known
        found = _find(request)
        if found.local.digest != known.local.digest:
            raise InvalidArgument(
                f"the files of {known.name!r} have changed since id {request.adapter_id} was first used; "
                "give the changed adapter another id",
                field="prompt_adapter_id",
            )
        return found

    def _read(self, local: LocalAdapter) -> LoadAdapter:
        info = self._engine.info
        data = check_tensors(
            local, hidden_size=info.hidden_size, max_virtual_tokens=info.max_virtual_tokens, dtype=info.dtype
        )
        rows = read_rows(local.spec, data)
        return LoadAdapter(
            digest=local.digest,
            rows=rows.data,
            dtype=rows.dtype,
            num_virtual_tokens=rows.num_virtual_tokens,
            hidden_size=rows.hidden_size,
        )


def _find(request: PromptAdapterRequest) -> _Known:
    local = find_adapter(request.local_path)
    return _Known(name=request.name, path=request.local_path, local=local, stamp=_stamp(local))


def _stamp(local: LocalAdapter) -> _Stamp:
    """Modification times and sizes: they change whenever one of the files is written again."""
    tensors = local.files.tensors_path
    statuses = [path.stat() for path in (tensors, tensors.with_name(CONFIG_FILE)) if path.exists()]
    return tuple((status.st_mtime_ns, status.st_size) for status in statuses)
