"""Adapters as they are uploaded: made in memory, each of another content."""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc as pb_grpc
from softprompt_api.rpc.channel import CHUNK_BYTES, open_channel

from benchmarks.adapters import peft_lora
from benchmarks.model_files import read_embedding_rows, read_linears

# Rows of all soft prompts are taken from so many of the vocabulary's, with some noise.
_NUM_ROWS = 4096
_NOISE_SHARE = 0.1
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshAdapter:
    """The two files of an adapter."""

    config_json: str
    tensors: bytes

    def messages(self, name: str) -> Iterator[pb.RegisterAdapterRequest]:
        """The messages of its registration."""
        yield pb.RegisterAdapterRequest(
            header=pb.RegisterAdapterHeader(
                name=name,
                config_json=self.config_json,
                tensors_size_bytes=len(self.tensors),
                tensors_sha256=hashlib.sha256(self.tensors).hexdigest(),
            )
        )
        for start in range(0, len(self.tensors), CHUNK_BYTES):
            chunk = pb.Chunk(offset=start, data=self.tensors[start : start + CHUNK_BYTES])
            yield pb.RegisterAdapterRequest(chunk=chunk)


class FreshAdapters:
    """Makes adapters for the model in a folder; the same ones for the same numbers."""

    def __init__(self, model: Path, vocab_size: int) -> None:
        self._linears = read_linears(model)
        token_ids = np.linspace(0, vocab_size - 1, _NUM_ROWS, dtype=np.int64).tolist()
        self._rows = read_embedding_rows(model, token_ids)
        self._noise = np.float32(_NOISE_SHARE * self._rows.std())

    def soft_prompt(self, number: int, num_virtual_tokens: int) -> FreshAdapter:
        """Rows near the vocabulary's, in float16."""
        random = np.random.default_rng([number, num_virtual_tokens])
        rows = self._rows[random.integers(len(self._rows), size=num_virtual_tokens)]
        rows = rows + self._noise * random.standard_normal(rows.shape, dtype=np.float32)
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": num_virtual_tokens,
            "token_dim": rows.shape[1],
        }
        return FreshAdapter(
            config_json=json.dumps(config), tensors=save({"prompt_embeddings": rows.astype(np.float16)})
        )

    def lora(self, number: int, rank: int) -> FreshAdapter:
        """A LoRA on every linear of the layers, in float16."""
        config, tensors = peft_lora(self._linears, number, rank)
        return FreshAdapter(config_json=json.dumps(config), tensors=save(tensors))


def register_all(address: str, adapters: Iterable[tuple[str, FreshAdapter]], *, at_once: int) -> float:
    """Register adapters by their names, so many at a time; the seconds it took."""

    async def run() -> float:
        left = iter(adapters)

        async def register_some(stub: "pb_grpc.RegistryServiceAsyncStub") -> None:
            for name, adapter in left:
                await stub.RegisterAdapter(adapter.messages(name), timeout=_TIMEOUT_S)

        async with open_channel(address) as channel:
            stub = pb_grpc.RegistryServiceStub(channel)
            start = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(register_some(stub))
            return time.perf_counter() - start

    return asyncio.run(run())
