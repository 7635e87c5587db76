"""Which replica takes a request: rendezvous hashing with bounded load.

A key puts all replicas in an order of its own, the same wherever it is computed. When a replica leaves, only the
keys that it came first for get another first, and when one joins, only those that it comes first for. What is
placed by one key is kept by one replica, as long as that has not much more to do than the others. One that has
reached `BALANCE` times the mean of what runs comes after those that have not: a hot key spreads to as many as it
needs.

Sources: Thaler and Ravishankar, "Using name-based mappings to increase hit rates" (1998); Mirrokni, Thorup and
Zadimoghaddam, "Consistent hashing with bounded loads" (2018).
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from softprompt_api.inference.v1 import inference_pb2 as pb

BALANCE = 1.25
# As much of a prompt as tells conversations apart, and not more than a request's cost of hashing should be.
_BEGINNING = 256
_FIRST_IDS = 64
_FIRST_MESSAGES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a request belongs.

    Attributes:
        served: the base model.
        digest: the adapter that it is placed by; "": none, the base model alone.
    """

    served: pb.GetModelResponse
    digest: str = ""

    def key(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> bytes:
        """What a request is placed by: its adapter, or how its prompt begins, of which a replica may have KV."""
        return self.digest.encode() if self.digest else _beginning(request)


def order(key: bytes, names: Iterable[str]) -> list[str]:
    """Names in the order of a key."""
    return sorted(names, key=lambda name: hashlib.blake2b(name.encode() + b"\0" + key, digest_size=16).digest())


def rank(key: bytes, loads: Mapping[str, int], *, adds: int = 1) -> list[str]:
    """Replicas by name, the one that takes a request first.

    Args:
        loads: what runs on each replica.
        adds: what the request would add to it.
    """
    bound = math.ceil(BALANCE * (sum(loads.values()) + adds) / len(loads))
    return sorted(order(key, loads), key=lambda name: loads[name] >= bound)


def _beginning(request: pb.GenerateRequest | pb.TokenizeRequest) -> bytes:
    salt = request.cache_salt if isinstance(request, pb.GenerateRequest) else ""
    return f"{salt}\0{_first_words(request)}".encode()


def _first_words(request: pb.GenerateRequest | pb.TokenizeRequest) -> str:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text[:_BEGINNING]
        case "chat":
            # A conversation goes on where its earlier turns were computed, whatever system message others share.
            return "\0".join(message.content[:_BEGINNING] for message in request.chat.messages[:_FIRST_MESSAGES])
        case "token_ids" if isinstance(request, pb.GenerateRequest):
            return str(request.token_ids.ids[:_FIRST_IDS])
        case _:
            return "\0".join(part.text[:_BEGINNING] for part in request.parts.parts[:_FIRST_MESSAGES])
