"""How `model` is spelled: the grammar that every service shares.

    model   = base-id | [base-id ":"] adapter
    adapter = name ["@" (number | "latest")] | "sha256:" 64 hex digits

`name` alone means its latest version.
"""

import re
from dataclasses import dataclass

from softprompt_api.errors import InvalidArgument

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}\Z")
DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}\Z")
RESERVED_NAMES = frozenset({"latest", "base", "none", "default", "sha256"})
LATEST = "latest"
_MAX_VERSION = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One spelling of an adapter, parsed: a digest, or a name with a version (None: the latest)."""

    name: str = ""
    version: int | None = None
    digest: str = ""

    def __str__(self) -> str:
        if self.digest:
            return self.digest
        return self.name if self.version is None else f"{self.name}@{self.version}"


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


def parse_adapter(spelling: str, *, field: str = "adapter") -> AdapterRef:
    """Parse `name`, `name@3`, `name@latest` or `sha256:…`; raise InvalidArgument otherwise."""
    if spelling.startswith("sha256:"):
        if not DIGEST_PATTERN.match(spelling):
            raise InvalidArgument("a digest is 'sha256:' and 64 lower-case hex digits", field=field)
        return AdapterRef(digest=spelling)
    name, at, version = spelling.partition("@")
    check_name(name, field=field)
    if not at or version == LATEST:
        return AdapterRef(name=name)
    # isascii: str.isdigit alone accepts digits of every script.
    if not (version.isascii() and version.isdigit() and len(version) <= 10 and 1 <= int(version) <= _MAX_VERSION):
        raise InvalidArgument(f"{shown(spelling)}: after '@' stands a version number or 'latest'", field=field)
    return AdapterRef(name=name, version=int(version))


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
