"""The registry's settings, read once from flags and environment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, DirectoryPath, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from softprompt_api.rpc.tls import ServerTls
from softprompt_api.settings import SettingsError, check_reach, read, refuse_unknown_variables

__all__ = ["Settings", "SettingsError", "read_settings"]

ENV_PREFIX = "SOFTPROMPT_REGISTRY_"
_GIB = 2**30

PositiveSeconds = Annotated[float, Field(gt=0, le=86_400)]


class Settings(BaseSettings):
    """Everything about the registry that can be set; sizes in bytes, times in seconds.

    A field is the flag `--field-name`, or the variable `SOFTPROMPT_REGISTRY_<FIELD>`; the log format, which other
    services share, is `SOFTPROMPT_LOG_FORMAT`.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", populate_by_name=True)

    address: str = Field("127.0.0.1:2243", min_length=3, description="host:port to listen on; port 0: a free one")
    allow_remote: bool = Field(False, description="listen beyond this machine's loopback, whoever may call there")
    tls_cert: Path | None = Field(
        None, description="certificate to serve with, as PEM; without it there is no TLS"
    )
    tls_key: Path | None = Field(None, description="its private key, as PEM")
    tls_client_ca: Path | None = Field(
        None, description="authorities whose certificates callers must have, as PEM; without it they need none"
    )
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="redis://, rediss:// or unix:// of the store")
    durability: Literal["strong", "weak"] = Field(
        "strong", description="strong: start only with a store that keeps every acknowledged write"
    )
    log_format: Literal["auto", "json"] = Field(
        "auto",
        description="json, or what suits the terminal",
        validation_alias=AliasChoices("log-format", "SOFTPROMPT_LOG_FORMAT"),
    )

    allow_file_imports: DirectoryPath | None = Field(
        None, description="root of the folders of this machine that may be imported"
    )
    allow_hub_imports: bool = Field(False, description="import public repositories of the hub")
    max_upload_bytes: int = Field(2 * _GIB, ge=1024, description="largest tensor file")
    max_uploads: int = Field(64, ge=1, le=4096, description="uploads at the same time")
    max_watchers: int = Field(256, ge=1, le=4096, description="watchers, and holders of leases, at the same time")
    upload_timeout_s: PositiveSeconds = Field(900.0, description="for one upload")
    heartbeat_s: PositiveSeconds = Field(5.0, description="between heartbeats of a quiet watch")
    lease_s: float = Field(
        2.0,
        ge=0,
        le=60,
        description="for which gateways may answer without asking; for as long a change may wait for one that is "
        "gone; 0: they ask each time",
    )
    store_timeout_s: PositiveSeconds = Field(5.0, description="for one command of the store")
    start_timeout_s: PositiveSeconds = Field(30.0, description="to wait for the store at the start")
    probe_interval_s: PositiveSeconds = Field(1.0, description="between looks whether the store answers")
    grace_s: float = Field(30.0, ge=0, le=3600, description="for running calls to end after SIGTERM")

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        check_reach(
            self.address,
            allow_remote=self.allow_remote,
            setting="address",
            permission="allow_remote",
            tls=self.server_tls,
        )
        return self

    @property
    def server_tls(self) -> ServerTls | None:
        """How it is served; None: without TLS."""
        return ServerTls.of(self.tls_cert, self.tls_key, self.tls_client_ca)

    @model_validator(mode="after")
    def _check_redis_url(self) -> Self:
        if not self.redis_url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("redis_url must begin with redis://, rediss:// or unix://")
        return self


def read_settings(arguments: Sequence[str] = ()) -> Settings:
    """Read flags and environment; SettingsError, in plain words, for an unknown setting or a bad value."""
    refuse_unknown_variables(Settings)
    return read(Settings, arguments, program="python -m softprompt_registry")
