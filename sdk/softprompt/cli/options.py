"""What `softprompt run` is told: flags win over the environment, which wins over the config file."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from softprompt_api.errors import InvalidArgument
from softprompt_api.names import check_name
from softprompt_api.rpc.tls import ServerTls

from softprompt.cli.problems import WrongUsage

_STORE_URLS = ("redis://", "rediss://", "unix://")
_DEVICES = re.compile(r"auto|cpu|cuda(:\d{1,3})?|cuda:\d{1,3}(,cuda:\d{1,3})+")
Port = Annotated[int, Field(ge=0, le=65535)]


def default_data_dir() -> str:
    """`$XDG_DATA_HOME/softprompt`, or `~/.local/share/softprompt`."""
    return str(Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share") / "softprompt")


def expand_data_dir(data_dir: str) -> Path:
    """The data folder, from the root on; WrongUsage where its `~` is nobody's home folder."""
    try:
        return Path(data_dir).expanduser().absolute()
    except RuntimeError:
        raise WrongUsage(
            f"there is no home folder for {data_dir}: choose a data folder with --data-dir, or SOFTPROMPT_DATA_DIR"
        ) from None


def default_model() -> str:
    """The model that is served when none is named."""
    from softprompt_inference.model.source import DEFAULT_MODEL

    return DEFAULT_MODEL


class RunOptions(BaseModel):
    """Options of one system on this machine. Field names are the config file's keys and, with dashes, the flags.

    Ports: 0 takes a free one; replicas listen on `inference_port` and those behind it. Sizes: `kv_cache_gb` in
    GiB; `gpu_memory_utilization` is a share; replicas on one device divide both. None leaves the choice to the
    service.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: str = Field(default_factory=default_model, min_length=1)
    served_model_name: str | None = Field(default=None, min_length=1)
    host: str = Field(default="127.0.0.1", min_length=1)
    port: Port = 2242
    tls_cert: str | None = Field(default=None, min_length=1)
    tls_key: str | None = Field(default=None, min_length=1, validate_default=True)
    require_keys: bool = False
    insecure: bool = False
    allowed_origins: str | None = Field(default=None, min_length=1)
    unknown_fields: Literal["error", "warn"] | None = None
    registry_port: Port = 2243
    inference_port: Port = 2244
    replicas: int = Field(default=1, ge=1, le=64)
    data_dir: str = Field(default_factory=default_data_dir, min_length=1)
    redis_url: str | None = Field(default=None, min_length=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int | None = Field(default=None, ge=1)
    enable_prefix_caching: bool = True
    share: bool = True
    native_kernels: bool = True
    enable_prompt_adapter: bool = True
    prompt_adapters: dict[str, str] = Field(default_factory=dict)
    max_prompt_adapters: int | None = Field(default=None, ge=1)
    max_prompt_adapter_token: int = Field(default=512, ge=1)
    enable_lora: bool = True
    lora_modules: dict[str, str] = Field(default_factory=dict)
    max_loras: int | None = Field(default=None, ge=0, le=1024)
    max_lora_rank: int | None = Field(default=None, ge=1, le=1024)
    allow_file_imports: str | None = Field(default=None, min_length=1)
    allow_hub_imports: bool = False

    @property
    def adapters(self) -> dict[str, str]:
        """Every adapter to register, by its name."""
        return {**self.prompt_adapters, **self.lora_modules}

    @field_validator("redis_url")
    @classmethod
    def _of_a_store(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(_STORE_URLS):
            raise ValueError(f"must begin with {', '.join(_STORE_URLS)}")
        return value

    @field_validator("device")
    @classmethod
    def _of_devices(cls, value: str) -> str:
        if not _DEVICES.fullmatch(value):
            raise ValueError(f"{value!r} is none of auto, cpu, cuda, cuda:N, nor several cuda:N joined by commas")
        return value

    @field_validator("allow_file_imports")
    @classmethod
    def _of_a_folder(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_dir():
            raise ValueError(f"there is no folder {value}")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _of_web_pages(cls, value: str | None) -> str | None:
        if value is not None:
            from softprompt_gateway.cors import Origins

            Origins.parse(value)
        return value

    @field_validator("tls_key")
    @classmethod
    def _of_the_certificate(cls, value: str | None, info: ValidationInfo) -> str | None:
        cert = info.data.get("tls_cert")
        ServerTls.of(Path(cert) if cert else None, Path(value) if value else None, None)
        return value

    @field_validator("prompt_adapters", "lora_modules", mode="before")
    @classmethod
    def _adapters_in_any_form(cls, value: object) -> dict[str, str]:
        return parse_adapters(value)

    @field_validator("enable_prompt_adapter", "enable_lora")
    @classmethod
    def _adapters_are_always_enabled(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "must be true: soft prompts and LoRAs are always served, and without any cost nothing"
            )
        return value

    @field_validator("lora_modules")
    @classmethod
    def _names_of_their_own(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        twice = next((name for name in value if name in info.data.get("prompt_adapters", {})), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is the name of a soft prompt too; give each adapter a name of its own")
        return value


def parse_adapters(value: object) -> dict[str, str]:
    """Adapter name → path from a mapping, or from a list of "name=path" or {name: …, path: …}.

    Raises ValueError, also when a name comes twice with different paths.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list | tuple):
        pairs = [_pair(entry) for entry in value]
    else:
        raise ValueError("must be a mapping of names to paths, or a list of NAME=PATH")
    adapters: dict[str, str] = {}
    for name, path in pairs:
        if not isinstance(name, str) or not isinstance(path, str) or not path:
            raise ValueError(f"{name!r}: {path!r} is not a name with a path")
        try:
            check_name(name)
        except InvalidArgument as error:
            raise ValueError(error.message) from error
        if adapters.setdefault(name, path) != path:
            raise ValueError(f"{name!r} is given twice, with different paths")
    return adapters


def _pair(entry: object) -> tuple[object, object]:
    if isinstance(entry, str) and "=" in entry:
        name, _, path = entry.partition("=")
        return name, path
    if isinstance(entry, Mapping) and set(entry) == {"name", "path"}:
        return entry["name"], entry["path"]
    if isinstance(entry, Mapping) and len(entry) == 1:
        return next(iter(entry.items()))
    raise ValueError(f"{entry!r} is not NAME=PATH")


def make_options(flags: Mapping[str, Any], config: Path | None = None) -> RunOptions:
    """Options from flags (None: not given), then the config file, then the defaults; WrongUsage otherwise."""
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        return RunOptions.model_validate({**(read_config(config) if config else {}), **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        source = f"--{key.replace('_', '-')}" if key in given else f"{key} in {config}" if config else key
        raise WrongUsage(f"{source}: {first['msg'].removeprefix('Value error, ')}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML config file; dashes may stand for underscores. WrongUsage names what is wrong."""
    try:
        loaded = _UniqueKeyLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise WrongUsage(f"cannot read the config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongUsage(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise WrongUsage(f"{path} must hold `key: value` lines, such as `model: {default_model()}`")
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        values[_known_key(str(key), path)] = value
    return values


def _known_key(key: str, path: Path) -> str:
    name = key.replace("-", "_")
    if name in RunOptions.model_fields:
        return name
    near = difflib.get_close_matches(name, RunOptions.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(RunOptions.model_fields)}"
    raise WrongUsage(f"unknown key {key!r} in {path}; {hint}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)
