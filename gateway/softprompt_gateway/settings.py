"""The gateway's settings, read once from the environment."""

from typing import Annotated, Literal

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from softprompt_api.settings import SettingsError, read, refuse_unknown_variables

__all__ = ["Settings", "SettingsError", "read_settings"]

ENV_PREFIX = "SOFTPROMPT_GATEWAY_"
_MIB = 2**20

PositiveSeconds = Annotated[float, Field(gt=0, le=86_400)]


def _shared(name: str) -> AliasChoices:
    """A setting that all services read under one variable; the field's own name serves `Settings(...)` in code."""
    return AliasChoices(name, f"SOFTPROMPT_{name.upper()}")


class Settings(BaseSettings):
    """Everything about the gateway that can be set; sizes in bytes, times in seconds.

    A field is read from `SOFTPROMPT_GATEWAY_<FIELD>`; the addresses and the log format, which other services
    share, from `SOFTPROMPT_<FIELD>`.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", populate_by_name=True)

    host: str = Field(default="127.0.0.1", min_length=1, description="interface to listen on")
    port: int = Field(default=2242, ge=0, le=65_535, description="port to listen on; 0 picks a free one")
    registry_address: str = Field(
        default="127.0.0.1:2243", min_length=1, validation_alias=_shared("registry_address")
    )
    inference_address: str = Field(
        default="127.0.0.1:2244", min_length=1, validation_alias=_shared("inference_address")
    )
    log_format: Literal["auto", "json"] = Field(default="auto", validation_alias=_shared("log_format"))

    max_body_bytes: int = Field(default=4 * _MIB, ge=1024, le=7 * _MIB, description="largest JSON body")
    max_upload_bytes: int = Field(default=2048 * _MIB, ge=1024, description="largest tensor file of a raw upload")
    max_choices: int = Field(default=128, ge=1, le=4096, description="most n x prompts of one request")
    max_requests: int = Field(default=4096, ge=1, description="requests answered at the same time; more get 503")

    header_timeout_s: PositiveSeconds = Field(default=10.0, description="to send a request's headers")
    body_timeout_s: PositiveSeconds = Field(default=60.0, description="to send a JSON body")
    upload_timeout_s: PositiveSeconds = Field(default=900.0, description="to send a tensor file")
    write_timeout_s: PositiveSeconds = Field(
        default=60.0, description="for a reader to take the next event of a stream"
    )
    request_timeout_s: PositiveSeconds = Field(default=1800.0, description="deadline of a generation")
    registry_timeout_s: PositiveSeconds = Field(default=5.0, description="deadline of a question to the registry")
    grace_s: float = Field(default=30.0, ge=0, le=3600, description="for running requests to end after SIGTERM")


def read_settings() -> Settings:
    """Read the environment; raise SettingsError, in plain words, for an unknown variable or a bad value."""
    refuse_unknown_variables(Settings)
    return read(Settings)
