"""How `model` is spelled: the grammar that every service shares.

    model   = base-id | [base-id ":"] adapter
    adapter = name ["@" (number | alias)] | "sha256:" 64 hex digits

`name` alone means `name@latest`: the alias that every registration moves to its version.
"""

import re
from dataclasses import dataclass

from softprompt_api.errors import InvalidArgument

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}\Z")
DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}\Z")
RESERVED_NAMES = frozenset({"latest", "base", "none", "default", "sha256"})
LATEST = "latest"
# An alias must never be taken for a version.
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?\Z")
_MAX_VERSION = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One spelling of an adapter, parsed: a digest, or a name with a version or an alias (neither: `latest`)."""

    name: str = ""
    version: int | None = None
    alias: str = ""
    digest: str = ""

    @property
    def is_latest(self) -> bool:
        """Whether it means whatever version is its name's latest."""
        return not self.digest and self.version is None and not self.alias

    def __str__(self) -> str:
        if self.digest:
            return self.digest
        pointer = self.alias if self.version is None else str(self.version)
        return f"{self.name}@{pointer}" if pointer else self.name


def check_name(name: str, *, field: str = "name", base_model_id: str = "") -> str:
    """Return `name` if an adapter may have it; raise InvalidArgument that says what is allowed."""
    if not NAME_PATTERN.match(name):
        raise InvalidArgument(
            f"{shown(name)} is not an adapter name: 1 to 128 lower-case letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit",
            field=field,
        )
    if name in RESERVED_NAMES or name == base_model_id.lower():
        raise InvalidArgument(f"{shown(name)} is reserved; choose another adapter name", field=field)
    return name


def check_alias(alias: str, *, field: str = "alias") -> str:
    """Return `alias` if a version may have it; raise InvalidArgument that says what is allowed."""
    if not NAME_PATTERN.match(alias) or _NUMBER.match(alias):
        raise InvalidArgument(
            f"{shown(alias)} is not an alias: 1 to 128 lower-case letters, digits, '.', '_' or '-', beginning "
            "with a letter or digit, and not a number",
            field=field,
        )
    return alias


def parse_adapter(spelling: str, *, field: str = "adapter") -> AdapterRef:
    """Parse `name`, `name@3`, `name@alias` or `sha256:…`; raise InvalidArgument otherwise."""
    if spelling.startswith("sha256:"):
        if not DIGEST_PATTERN.match(spelling):
            raise InvalidArgument("a digest is 'sha256:' and 64 lower-case hex digits", field=field)
        return AdapterRef(digest=spelling)
    name, at, pointer = spelling.partition("@")
    check_name(name, field=field)
    if not at or pointer == LATEST:
        return AdapterRef(name=name)
    # isascii: str.isdigit alone accepts digits of every script.
    if pointer.isascii() and pointer.isdigit() and len(pointer) <= 10 and 1 <= int(pointer) <= _MAX_VERSION:
        return AdapterRef(name=name, version=int(pointer))
    if not NAME_PATTERN.match(pointer) or _NUMBER.match(pointer):
        raise InvalidArgument(f"{shown(spelling)}: after '@' stands a version number or an alias", field=field)
    return AdapterRef(name=name, alias=pointer)


def parse_model(spelling: str, *, base_model_id: str, field: str = "model") -> AdapterRef | None:
    """Parse the `model` of a request: None for the base model, otherwise the adapter.

    `BASE:name` is accepted where BASE is exactly the base model's id.
    """
    if spelling == base_model_id:
        return None
    return parse_adapter(spelling.removeprefix(f"{base_model_id}:"), field=field)


def shown(text: str, limit: int = 64) -> str:
    """`text` quoted for a message, escaped and cut, so that no input can break or flood a log line."""
    return ascii(text if len(text) <= limit else text[:limit] + "…")
