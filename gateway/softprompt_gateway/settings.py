"""The gateway's settings, read once from the environment."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from softprompt_api.rpc.channel import MAX_CALL_S
from softprompt_api.rpc.tls import ServerTls
from softprompt_api.settings import ClientTlsSettings, SettingsError, is_loopback, read, refuse_unknown_variables

from softprompt_gateway.cors import Origins
from softprompt_gateway.discovery import Places

__all__ = ["Settings", "SettingsError", "read_settings"]

ENV_PREFIX = "SOFTPROMPT_GATEWAY_"
_MIB = 2**20
_REDIS_URLS = ("redis://", "rediss://", "unix://")

PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_CALL_S)]


def _shared(name: str) -> AliasChoices:
    """A setting that all services read under one variable."""
    return AliasChoices(f"SOFTPROMPT_{name.upper()}")


class Settings(ClientTlsSettings):
    """Everything about the gateway that can be set; sizes in bytes, times in seconds.

    A field is read from `SOFTPROMPT_GATEWAY_<FIELD>`; the addresses and the log format, which other services
    share, from `SOFTPROMPT_<FIELD>`.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", populate_by_name=True)

    host: str = Field(default="127.0.0.1", min_length=1, description="interface to listen on")
    port: int = Field(default=2242, ge=0, le=65_535, description="port to listen on; 0 picks a free one")
    tls_cert: Path | None = Field(None, description="certificate to serve HTTPS with, as PEM; otherwise HTTP")
    tls_key: Path | None = Field(None, description="its private key, as PEM")
    tls_client_ca: Path | None = Field(
        None, description="authorities whose certificates clients must have, as PEM; without it they need none"
    )
    registry_address: str = Field(
        default="127.0.0.1:2243", min_length=1, validation_alias=_shared("registry_address")
    )
    inference_address: str = Field(
        default="127.0.0.1:2244",
        validation_alias=_shared("inference_address"),
        description="host:port of each replica, joined by commas, or dns:///name:port for all that have a name",
    )
    log_format: Literal["auto", "json"] = Field(default="auto", validation_alias=_shared("log_format"))

    require_keys: bool = Field(default=False, description="ask for an API key before the first was made")
    insecure: bool = Field(default=False, description="ask for no API key, on any interface")
    allowed_origins: str | None = Field(
        default=None, description="origins whose web pages are let in, joined by commas; *: all, with an API key"
    )
    key_trust_s: Annotated[float, Field(ge=30, le=7 * 86_400)] = Field(
        default=3600.0, description="to go on with known API keys while the registry is away"
    )
    limits_redis_url: str | None = Field(
        default=None, description="where gateways count together for the limits of API keys; otherwise each alone"
    )

    max_body_bytes: int = Field(default=4 * _MIB, ge=1024, le=7 * _MIB, description="largest JSON body")
    max_upload_bytes: int = Field(default=2048 * _MIB, ge=1024, description="largest tensor file of a raw upload")
    max_choices: int = Field(default=128, ge=1, le=4096, description="most n x prompts of one request")
    unknown_fields: Literal["error", "warn"] = Field(
        default="error", description="whether unknown fields of requests that generate are refused, or left out"
    )
    max_requests: int = Field(default=4096, ge=1, description="requests answered at the same time; more get 503")
    metrics_adapters: int = Field(
        default=100, ge=0, le=10_000, description="adapters with counters of their own, the first that are used"
    )

    header_timeout_s: PositiveSeconds = Field(default=10.0, description="to send a request's headers")
    body_timeout_s: PositiveSeconds = Field(default=60.0, description="to send a JSON body")
    upload_timeout_s: PositiveSeconds = Field(default=900.0, description="to send a tensor file")
    write_timeout_s: PositiveSeconds = Field(
        default=60.0, description="for a reader to take the next event of a stream"
    )
    request_timeout_s: PositiveSeconds = Field(default=1800.0, description="deadline of a generation")
    registry_timeout_s: PositiveSeconds = Field(default=5.0, description="deadline of a question to the registry")
    grace_s: float = Field(default=30.0, ge=0, le=3600, description="for running requests to end after SIGTERM")

    @field_validator("inference_address")
    @classmethod
    def _check_places(cls, value: str) -> str:
        Places.parse(value)
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: str | None) -> str | None:
        Origins.parse(value)
        return value

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.require_keys and self.insecure:
            raise ValueError("require_keys and insecure exclude each other")
        if self.limits_redis_url is not None and not self.limits_redis_url.startswith(_REDIS_URLS):
            raise ValueError(f"limits_redis_url must begin with {', '.join(_REDIS_URLS)}")
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        _ = self.server_tls
        return self

    @property
    def server_tls(self) -> ServerTls | None:
        """How HTTP is served; None: without TLS."""
        return ServerTls.of(self.tls_cert, self.tls_key, self.tls_client_ca)

    @property
    def origins(self) -> Origins:
        """Whose web pages are let in."""
        return Origins.parse(self.allowed_origins)

    @property
    def inference_places(self) -> Places:
        """Where the inference services are."""
        return Places.parse(self.inference_address)

    @property
    def always_asks_for_keys(self) -> bool:
        """Whether a key is asked for even where none was ever made: where others than this machine can ask."""
        return not self.insecure and (self.require_keys or not is_loopback(self.host))


def read_settings() -> Settings:
    """Read the environment; raise SettingsError, in plain words, for an unknown variable or a bad value."""
    refuse_unknown_variables(Settings)
    return read(Settings)
