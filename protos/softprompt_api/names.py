"""How `model` is spelled: the grammar that every service shares.

    model   = base-id | [base-id ":"] part {"+" part}
    part    = adapter [":" task]
    adapter = [tenant "/"] (name ["@" (number | alias)] | "sha256:" 64 hex digits)

`name` alone means `name@latest`: the alias that every registration moves to its version. A task is a number from
0, of an adapter that was trained for several. `+` puts adapters together in one request, as far as
`softprompt_api.composition` lets them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from softprompt_api.errors import InvalidArgument
from softprompt_api.tenants import DEFAULT_TENANT, check_tenant

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}\Z")
DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}\Z")
RESERVED_NAMES = frozenset({"latest", "base", "none", "default", "sha256"})
LATEST = "latest"
_PLUS = "+"
# An alias must never be taken for a version.
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?\Z")
MAX_VERSION = 2**31 - 1
_TASK_PATTERN = re.compile(r"(0|[1-9][0-9]{0,8})\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One spelling of an adapter, parsed.

    It is a digest, or a name with a version or an alias (neither: `latest`); each with a task, or without.

    Attributes:
        name: the full name, with its tenant where that is not the default one.
        owner: of a digest, the tenant whose version is meant; "": anybody's.
    """

    name: str = ""
    version: int | None = None
    alias: str = ""
    digest: str = ""
    task: int | None = None
    owner: str = ""

    @property
    def is_latest(self) -> bool:
        """Whether it means whatever version is its name's latest."""
        return not self.digest and self.version is None and not self.alias

    def __str__(self) -> str:
        pointer = self.alias if self.version is None else str(self.version)
        owner = f"{self.owner}/" if self.owner else ""
        return with_task(owner + (self.digest or self.name) + (f"@{pointer}" if pointer else ""), self.task)

    @property
    def whole(self) -> "AdapterRef":
        """The adapter itself, without a task: what the registry knows."""
        return self if self.task is None else replace(self, task=None)


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


def check_full_name(name: str, *, field: str = "name", base_model_id: str = "") -> str:
    """Return `name` if an adapter may have it across all tenants; raise InvalidArgument that says why not."""
    tenant, slash, local = name.rpartition("/")
    check_name(local, field=field)
    if slash and check_tenant(tenant, field=field) == DEFAULT_TENANT:
        raise InvalidArgument("names of the default tenant have no tenant before them", field=field)
    if name == base_model_id.lower():
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
    """Parse `name`, `name@3`, `name@alias` or `sha256:…`, each with a tenant or without; else InvalidArgument."""
    tenant, slash, local = spelling.rpartition("/")
    if local.startswith("sha256:"):
        if not DIGEST_PATTERN.match(local):
            raise InvalidArgument("a digest is 'sha256:' and 64 lower-case hex digits", field=field)
        return AdapterRef(digest=local, owner=check_tenant(tenant, field=field) if slash else "")
    name, at, pointer = spelling.partition("@")
    check_full_name(name, field=field)
    if not at or pointer == LATEST:
        return AdapterRef(name=name)
    # isascii: str.isdigit alone accepts digits of every script.
    if pointer.isascii() and pointer.isdigit() and len(pointer) <= 10 and 1 <= int(pointer) <= MAX_VERSION:
        return AdapterRef(name=name, version=int(pointer))
    if not NAME_PATTERN.match(pointer) or _NUMBER.match(pointer):
        raise InvalidArgument(f"{shown(spelling)}: after '@' stands a version number or an alias", field=field)
    return AdapterRef(name=name, alias=pointer)


def parse_requested(spelling: str, *, field: str = "adapter") -> AdapterRef:
    """Parse what `parse_adapter` does, with `:0` or another task behind it, or not."""
    adapter, colon, task = spelling.rpartition(":")
    if not colon or adapter.rpartition("/")[2] == "sha256":
        return parse_adapter(spelling, field=field)
    ref = parse_adapter(adapter, field=field)
    if not _TASK_PATTERN.match(task):
        raise InvalidArgument(f"{shown(spelling)}: after ':' stands the number of a task, from 0", field=field)
    return replace(ref, task=int(task))


def split_model(spelling: str, *, base_model_id: str) -> list[str]:
    """The adapters that the `model` of a request puts together, each as it is spelled there; none: the base model.

    `BASE:name` is accepted where BASE is exactly the base model's id.
    """
    if spelling == base_model_id:
        return []
    return spelling.removeprefix(f"{base_model_id}:").split(_PLUS)


def join_model(spellings: Iterable[str]) -> str:
    """The `model` that puts these adapters together."""
    return _PLUS.join(spellings)


def parse_model(spelling: str, *, base_model_id: str, field: str = "model") -> tuple[AdapterRef, ...]:
    """Parse the `model` of a request: its adapters in order, none for the base model."""
    return tuple(parse_requested(one, field=field) for one in split_model(spelling, base_model_id=base_model_id))


def with_task(spelling: str, task: int | None) -> str:
    """One task of an adapter, as requests spell it and caches know it; None: the adapter has no tasks."""
    return spelling if task is None else f"{spelling}:{task}"


def choose_task(ref: AdapterRef, num_tasks: int, *, field: str = "adapter") -> int | None:
    """The task a request is for: the one it names, or the only one; None where the adapter has no tasks.

    Raises InvalidArgument for a task that the adapter does not have, and where it has several and none is named.
    """
    if num_tasks == 0:
        if ref.task is not None:
            raise InvalidArgument(f"{ref.whole} has no tasks; leave ':{ref.task}' out", field=field)
        return None
    tasks = f"{ref.whole} has the tasks 0 to {num_tasks - 1}"
    if ref.task is None and num_tasks > 1:
        raise InvalidArgument(f"{tasks}; name one of them, for example {ref}:0", field=field)
    if ref.task is not None and ref.task >= num_tasks:
        raise InvalidArgument(f"{tasks}, and no task {ref.task}", field=field)
    return ref.task or 0


def shown(text: str, limit: int = 64) -> str:
    """`text` quoted for a message, escaped and cut, so that no input can break or flood a log line."""
    return ascii(text if len(text) <= limit else text[:limit] + "…")
