"""The inference service from Python: which adapters are in memory, and what they do."""

from dataclasses import asdict, dataclass
from typing import Any

from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from softprompt_api.rpc.tls import ClientTls

from softprompt.calls import ServiceClient
from softprompt.registry import AdapterInfo, info_of

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
        pinned: whether it stays on the device until it is evicted.
    """

    adapter: str
    digest: str
    tier: str
    size_bytes: int
    num_virtual_tokens: int
    idle_s: float
    hits: int
    in_use: int
    pinned: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualToken:
    """One virtual token of an adapter: its norm, and the tokens that are nearest to it, nearest first."""

    norm: float
    nearest: tuple["NearToken", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NearToken:
    """A token of the vocabulary, and the cosine of the angle between its embedding and a virtual token's."""

    token_id: int
    token: str
    cosine: float


def replicas_of(address: str) -> list[str]:
    """The address of each replica, where several are joined by commas."""
    return [place.strip() for place in address.split(",")]


class InferenceClient(ServiceClient):
    """A connection to an inference service; close it, or use it in a `with`.

    Every failed call raises an error of `softprompt_api.errors`.

    Args:
        address: `host:port` of the service's gRPC; of several replicas, joined by commas, the first is asked.
        tls: how it is called; None: without TLS.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, tls: ClientTls | None = None) -> None:
        super().__init__("inference service", replicas_of(address)[0], tls)
        self._stub = InferenceServiceStub(self._channel)

    def resident(self, limit: int = 1000) -> tuple[list[ResidentInfo], int]:
        """The adapters in memory, most recently used first, at most `limit`; and how many there are."""
        with self._translated():
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
                pinned=one.pinned,
            )
            for one in answer.adapters
        ]
        return adapters, answer.total_size

    def preload(self, adapter: str, *, pin: bool = False) -> str:
        """Bring an adapter to the device, and `pin` it there until it is evicted; its digest."""
        with self._translated():
            return self._stub.Preload(pb.PreloadRequest(adapter=adapter, pin=pin), timeout=_LOAD_TIMEOUT_S).digest

    def evict(self, adapter: str) -> str:
        """Let an adapter that no request uses go from memory, also a pinned one; its digest."""
        with self._translated():
            return self._stub.Evict(pb.EvictRequest(adapter=adapter), timeout=_CALL_TIMEOUT_S).digest

    def probe(self, adapter: str) -> AdapterInfo:
        """Measure what an adapter does to the next token of a few fixed prompts; the registry keeps the result."""
        with self._translated():
            answer = self._stub.ProbeAdapter(pb.ProbeAdapterRequest(adapter=adapter), timeout=_LOAD_TIMEOUT_S)
        return info_of(answer.adapter)

    def nearest(self, adapter: str, *, top_k: int = 5) -> list[VirtualToken]:
        """The tokens of the vocabulary that are nearest to each virtual token of an adapter."""
        request = pb.NearestTokensRequest(adapter=adapter, top_k=top_k)
        with self._translated():
            answer = self._stub.NearestTokens(request, timeout=_LOAD_TIMEOUT_S)
        return [
            VirtualToken(
                norm=virtual.norm,
                nearest=tuple(
                    NearToken(token_id=near.token_id, token=near.token, cosine=near.cosine)
                    for near in virtual.nearest
                ),
            )
            for virtual in answer.virtual_tokens
        ]

    def model(self) -> pb.GetModelResponse:
        """What is served."""
        with self._translated():
            return self._stub.GetModel(pb.GetModelRequest(), timeout=_CALL_TIMEOUT_S)

    def generate(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        """Every event of a generation, once it has ended."""
        with self._translated():
            return list(self._stub.Generate(request, timeout=_LOAD_TIMEOUT_S))
