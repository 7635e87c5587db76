"""One adapter in host memory."""

from dataclasses import dataclass

from softprompt_api.errors import Unsupported
from softprompt_api.formats import AdapterKind, AdapterSpec, Rows, read_adapter

from softprompt_inference.engine.messages import LoadAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's verified rows, one for each virtual token.

    Attributes:
        digest: the version's digest, and its task where it has several.
        spelling: `name@version` of one of the versions that have it.
        rows: `[num_virtual_tokens, row_size]`, row-major, little endian.
        dtype: "float32", "float16" or "bfloat16".
        row_size: the hidden size, or that of keys and values of all layers.
        are_key_values: rows go into the KV cache as they are.
    """

    digest: str
    spelling: str = ""
    rows: bytes
    dtype: str
    num_virtual_tokens: int
    row_size: int
    are_key_values: bool = False

    @classmethod
    def read(
        cls,
        digest: str,
        spec: AdapterSpec,
        data: bytes,
        *,
        task: int | None = None,
        dtype: str = "",
        spelling: str = "",
    ) -> "Adapter":
        """The adapter in a complete file that was verified; `task` and `dtype` are as in AdapterSpec.read."""
        check_served(spec)
        rows = read_adapter(spec, data, task=task, dtype=dtype)
        assert isinstance(rows, Rows)
        return cls(
            digest=digest,
            spelling=spelling,
            rows=rows.data,
            dtype=rows.dtype,
            num_virtual_tokens=rows.num_virtual_tokens,
            row_size=rows.row_size,
            are_key_values=rows.are_key_values,
        )

    @property
    def size_bytes(self) -> int:
        """Host memory it takes."""
        return len(self.rows)

    def load_command(self) -> LoadAdapter:
        """What tells the engine to take it."""
        return LoadAdapter(
            digest=self.digest,
            rows=self.rows,
            dtype=self.dtype,
            num_virtual_tokens=self.num_virtual_tokens,
            row_size=self.row_size,
            are_key_values=self.are_key_values,
        )


def check_served(spec: AdapterSpec) -> None:
    """Raise Unsupported for a kind that is registered and not served."""
    if spec.kind is AdapterKind.LORA:
        raise Unsupported(
            "LORA adapters are registered, but not served; served are adapters of virtual tokens", field="adapter"
        )
