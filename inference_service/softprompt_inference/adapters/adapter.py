"""One adapter in host memory."""

from dataclasses import dataclass

from softprompt_inference.engine.messages import LoadAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's verified rows.

    Attributes:
        digest: the version's digest.
        spelling: `name@version` of one of the versions that have it.
        rows: `[num_virtual_tokens, hidden_size]`, row-major, little endian.
        dtype: "float32", "float16" or "bfloat16".
    """

    digest: str
    spelling: str = ""
    rows: bytes
    dtype: str
    num_virtual_tokens: int
    hidden_size: int

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
            hidden_size=self.hidden_size,
        )
