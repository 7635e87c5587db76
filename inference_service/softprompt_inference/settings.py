"""The inference service's settings, read once from flags and environment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, model_validator
from pydantic_settings import SettingsConfigDict
from softprompt_api.formats import DEFAULT_MAX_LORA_RANK
from softprompt_api.rpc.tls import ServerTls
from softprompt_api.settings import ClientTlsSettings, SettingsError, check_reach, read

from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model.source import DEFAULT_MODEL, is_default_model, native_kernels_dir

__all__ = ["Settings", "SettingsError", "read_settings"]

ENV_PREFIX = "SOFTPROMPT_"
_MIB = 2**20
_GIB = 2**30

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
UpTo1024 = Annotated[int, Field(ge=1, le=1024)]


class Settings(ClientTlsSettings):
    """Everything about the inference service that can be set; times in seconds, sizes as bytes or like "4GiB".

    A field is the flag `--field-name`, or the variable `SOFTPROMPT_<FIELD>`.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", protected_namespaces=())

    inference_address: str = Field("127.0.0.1:2244", min_length=3, description="host:port to listen on")
    inference_allow_remote: bool = Field(
        False, description="listen beyond this machine's loopback, whoever may call there"
    )
    inference_tls_cert: Path | None = Field(
        None, description="certificate to serve with, as PEM; without it there is no TLS"
    )
    inference_tls_key: Path | None = Field(None, description="its private key, as PEM")
    inference_tls_client_ca: Path | None = Field(
        None, description="authorities whose certificates callers must have, as PEM; without it they need none"
    )
    registry_address: str = Field("127.0.0.1:2243", min_length=3, description="host:port of the registry")
    log_format: Literal["auto", "json"] = Field("auto", description="json, or what suits the terminal")

    model: str = Field(DEFAULT_MODEL, min_length=1, description="folder, .gguf file or hub id of the base model")
    served_model_name: str | None = Field(None, min_length=1, description="public id; default: from the model")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of weights and KV")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="share of the GPU's memory for all of this; default: most of what is free"
    )
    kv_cache_bytes: ByteSize | None = Field(None, ge=_MIB, description="memory for KV; default: what is free")
    max_model_len: PositiveInt | None = Field(None, description="longest sequence; default: the model's")
    max_num_sequences: PositiveInt = Field(256, description="most sequences in one batch")
    max_step_tokens: PositiveInt | None = Field(None, description="most tokens in one step")
    num_threads: PositiveInt | None = Field(None, description="torch's threads on a CPU")
    native_kernels: bool = Field(True, description="compile CPU kernels where a C compiler is installed")
    enable_prefix_caching: bool = Field(True, description="compute shared beginnings and soft prompts only once")
    share: bool = Field(True, description="share KV of soft prompts between requests; off for measuring")

    max_virtual_tokens: PositiveInt = Field(512, description="most virtual tokens of one adapter")
    max_prompt_adapters: PositiveInt = Field(1024, description="most soft prompts on the device at one time")
    max_adapter_rows: PositiveInt = Field(65_536, description="most virtual tokens on the device at one time")
    max_key_value_bytes: ByteSize = Field(
        ByteSize(_GIB), ge=_MIB, description="memory for soft prompts that are keys and values"
    )
    max_loras: int = Field(
        16, ge=0, le=1024, description="most LoRAs on the device at one time; 0: LoRAs are refused"
    )
    max_lora_rank: UpTo1024 = Field(DEFAULT_MAX_LORA_RANK, description="highest rank of a LoRA")
    max_lora_bytes: ByteSize = Field(ByteSize(2 * _GIB), ge=1024, description="largest tensor file of a LoRA")
    adapter_cache_bytes: ByteSize = Field(ByteSize(512 * _MIB), ge=0, description="adapters in host memory")

    max_queued_requests: PositiveInt = Field(1024, description="most completions waiting beside a full batch")
    max_queue_s: Seconds = Field(30.0, description="longest wait for a turn; who would wait longer gets 503")
    engine_silence_s: Seconds = Field(
        120.0, description="an engine that says nothing for so long is ended, and started again"
    )
    grace_s: float = Field(30.0, ge=0, le=3600, description="for running requests to end after SIGTERM")

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        check_reach(
            self.inference_address,
            allow_remote=self.inference_allow_remote,
            setting="inference_address",
            permission="inference_allow_remote",
            tls=self.server_tls,
        )
        return self

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.max_adapter_rows < self.max_virtual_tokens:
            raise ValueError(
                f"max_adapter_rows {self.max_adapter_rows} must hold one adapter of max_virtual_tokens "
                f"{self.max_virtual_tokens}"
            )
        return self

    @property
    def server_tls(self) -> ServerTls | None:
        """How it is served; None: without TLS."""
        return ServerTls.of(
            self.inference_tls_cert,
            self.inference_tls_key,
            self.inference_tls_client_ca,
            prefix="inference_",
        )

    @property
    def model_id(self) -> str:
        """The base model's public id."""
        if self.served_model_name is not None:
            return self.served_model_name
        path = Path(self.model).expanduser()
        if path.exists():
            return path.resolve().stem if path.is_file() else path.resolve().name
        return DEFAULT_MODEL if is_default_model(self.model) else self.model

    def engine_config(self, model_path: Path | None = None) -> EngineConfig:
        """What the engine is started with; None: its model is not known yet."""
        return EngineConfig(
            model_path=str(model_path or ""),
            device=self.device,
            dtype=self.dtype,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_bytes=None if self.kv_cache_bytes is None else int(self.kv_cache_bytes),
            max_model_len=self.max_model_len,
            max_num_sequences=self.max_num_sequences,
            max_step_tokens=self.max_step_tokens,
            max_virtual_tokens=self.max_virtual_tokens,
            max_loras=self.max_loras,
            max_lora_rank=self.max_lora_rank,
            num_threads=self.num_threads,
            native_cache_dir=str(native_kernels_dir()) if self.native_kernels else None,
            enable_prefix_caching=self.enable_prefix_caching,
            share=self.share,
        )


def read_settings(arguments: Sequence[str] = ()) -> Settings:
    """Read flags and environment; SettingsError, in plain words, for a bad value."""
    return read(Settings, arguments, program="python -m softprompt_inference")
