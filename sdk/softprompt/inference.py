"""The inference service from Python: which adapters are in memory."""

from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from softprompt_api.rpc.channel import open_blocking_channel

from softprompt.calls import translated

DEFAULT_ADDRESS = "127.0.0.1:2244"
_CALL_TIMEOUT_S = 20.0
_LOAD_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentInfo:
    """An adapter in the inference service's memory.

    Attributes:
        adapter: `name@version` of one of the versions with this content.
        digest: identity of the content.
        tier: "device", or "host" while it is in host memory alone.
        size_bytes, num_virtual_tokens: of its rows.
        idle_s: seconds since the last request let it go.
        hits: requests that asked for it; in_use: those that use it now.
    """

    adapter: str
    digest: str
    tier: str
    size_bytes: int
    num_virtual_tokens: int
    idle_s: float
    hits: int
    in_use: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class InferenceClient:
    """A connection to an inference service; close it, or use it in a `with`.

    Every failed call raises an error of `softprompt_api.errors`.

    Args:
        address: `host:port` of the service's gRPC.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self._address = address
        self._channel = open_blocking_channel(address)
        self._stub = InferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def resident(self, limit: int = 1000) -> tuple[list[ResidentInfo], int]:
        """The adapters in memory, most recently used first, at most `limit`; and how many there are."""
        with translated("inference service", self._address):
            answer = self._stub.ListResident(pb.ListResidentRequest(limit=limit), timeout=_CALL_TIMEOUT_S)
        adapters = [
            ResidentInfo(
                adapter=one.adapter,
                digest=one.digest,
                tier=pb.ResidentTier.Name(one.tier).removeprefix("RESIDENT_TIER_").lower(),
                size_bytes=one.size_bytes,
                num_virtual_tokens=one.num_virtual_tokens,
                idle_s=one.idle_s,
                hits=one.hits,
                in_use=one.in_use,
            )
            for one in answer.adapters
        ]
        return adapters, answer.total_size

    def preload(self, adapter: str) -> str:
        """Bring an adapter to the device; its digest."""
        with translated("inference service", self._address):
            return self._stub.Preload(pb.PreloadRequest(adapter=adapter), timeout=_LOAD_TIMEOUT_S).digest

    def evict(self, adapter: str) -> str:
        """Let an adapter that no request uses go from memory; its digest."""
        with translated("inference service", self._address):
            return self._stub.Evict(pb.EvictRequest(adapter=adapter), timeout=_CALL_TIMEOUT_S).digest
