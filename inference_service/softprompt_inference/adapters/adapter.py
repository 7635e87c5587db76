"""One adapter in host memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from softprompt_api.formats import AdapterSpec, Content, Lora, read_adapter
from softprompt_api.formats.safetensors_header import TensorInfo
from softprompt_api.formats.values import FLOAT_DTYPES, as_float32

from softprompt_inference.engine.files import MemoryFile
from softprompt_inference.engine.messages import LoadAdapter, LoadLora, LoraModule

_STORED_AS = {name: stored for stored, name in FLOAT_DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What is known of an adapter wherever its rows or matrices are; see Adapter."""

    digest: str
    spelling: str
    is_lora: bool
    num_virtual_tokens: int
    are_key_values: bool
    size_bytes: int

    @property
    def name(self) -> str:
        """The name of one of the versions that have it."""
        return self.spelling.partition("@")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What a verified adapter holds: rows, one for each virtual token, or the matrices of a LoRA.

    Attributes:
        digest: the version's digest, and its task where it has several.
        spelling: `name@version` of one of the versions that have it.
        file: that matrices, or keys and values, were read from; None: there is none.
    """

    digest: str
    spelling: str = ""
    content: Content
    file: MemoryFile | None = field(default=None, compare=False, repr=False)

    @classmethod
    def read(
        cls,
        digest: str,
        spec: AdapterSpec,
        data: bytes | bytearray | memoryview,
        *,
        infos: Mapping[str, TensorInfo] | None = None,
        task: int | None = None,
        dtype: str = "",
        spelling: str = "",
        file: MemoryFile | None = None,
    ) -> "Adapter":
        """The adapter in a complete file that was verified; further arguments as in read_adapter.

        Args:
            file: that `data` was read from.
        """
        content = read_adapter(spec, data, infos=infos, task=task, dtype=dtype)
        # Others go to the engine in their messages.
        is_in_file = isinstance(content, Lora) or content.are_key_values
        return cls(digest=digest, spelling=spelling, content=content, file=file if is_in_file else None)

    @property
    def info(self) -> AdapterInfo:
        """All of it but its rows or matrices."""
        return AdapterInfo(
            digest=self.digest,
            spelling=self.spelling,
            is_lora=self.is_lora,
            num_virtual_tokens=self.num_virtual_tokens,
            are_key_values=self.are_key_values,
            size_bytes=self.size_bytes,
        )

    @property
    def is_lora(self) -> bool:
        """Whether it changes linears of the model, and has no virtual tokens."""
        return isinstance(self.content, Lora)

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that it puts before a prompt."""
        return 0 if isinstance(self.content, Lora) else self.content.num_virtual_tokens

    @property
    def are_key_values(self) -> bool:
        """Whether its rows go into the KV cache as they are."""
        return not isinstance(self.content, Lora) and self.content.are_key_values

    @property
    def size_bytes(self) -> int:
        """Host memory it takes."""
        if isinstance(self.content, Lora):
            return sum(len(module.a) + len(module.b) for module in self.content.modules)
        return len(self.content.data)

    def load_command(self) -> LoadAdapter | LoadLora:
        """What tells the engine to take it."""
        if isinstance(self.content, Lora):
            return _load_lora(self.digest, self.content, self.file)
        rows = self.content
        return LoadAdapter(
            digest=self.digest,
            rows=rows.data,
            dtype=rows.dtype,
            num_virtual_tokens=rows.num_virtual_tokens,
            row_size=rows.row_size,
            are_key_values=rows.are_key_values,
            file=self.file,
        )


def _load_lora(digest: str, lora: Lora, file: MemoryFile | None) -> LoadLora:
    """The engine's command; matrices of several dtypes go as float32, which holds the values of each."""
    dtypes = {module.dtype for module in lora.modules}
    is_mixed = len(dtypes) > 1
    dtype = "float32" if is_mixed else dtypes.pop()
    return LoadLora(
        digest=digest,
        modules=[
            LoraModule(
                name=module.name,
                rank=module.rank,
                scale=module.scale,
                a=_in_dtype(module.a, module.dtype, dtype),
                b=_in_dtype(module.b, module.dtype, dtype),
            )
            for module in lora.modules
        ],
        dtype=dtype,
        file=None if is_mixed else file,
    )


def _in_dtype(values: memoryview, dtype: str, wanted: str) -> bytes | memoryview:
    return values if dtype == wanted else as_float32(values, _STORED_AS[dtype]).tobytes()
