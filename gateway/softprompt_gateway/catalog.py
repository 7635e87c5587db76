"""The adapters that this gateway has heard of: for listings, near names, and while the registry is away."""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice

from softprompt_api.names import LATEST, AdapterRef
from softprompt_api.registry.v1.registry_pb2 import (
    AdapterEventType,
    AdapterKind,
    AdapterVersion,
    WatchAdaptersResponse,
)
from softprompt_api.tenants import local_name, tenant_of

_MAX_REMEMBERED = 4096


_TOLD_WHOLE = (
    AdapterEventType.ADAPTER_EVENT_TYPE_REGISTERED,
    AdapterEventType.ADAPTER_EVENT_TYPE_ALIAS_SET,
    AdapterEventType.ADAPTER_EVENT_TYPE_UPDATED,
)


def spelling_of(version: AdapterVersion) -> str:
    """`name@version`, which stands for this content for ever."""
    return f"{version.name}@{version.version}"


def kind_name(kind: int) -> str:
    """PEFT's name of a kind, for example "PROMPT_TUNING"."""
    return AdapterKind.Name(AdapterKind.ValueType(kind)).removeprefix("ADAPTER_KIND_")


def _is_newer(version: AdapterVersion, known: AdapterVersion | None) -> bool:
    """Whether nothing later is known under the same key; revisions of different names do not compare."""
    return known is None or known.name != version.name or known.revision <= version.revision


def _any(_name: str) -> bool:
    return True


class Catalog:
    """The latest version of every name, and versions that were asked for lately.

    `synced` is true once everything the registry has was listed.
    """

    def __init__(self) -> None:
        self.synced = False
        self._latest: dict[str, AdapterVersion] = {}
        # By tenant/digest and by name@version, which mean one content for ever, and by name@alias.
        self._remembered: OrderedDict[str, AdapterVersion] = OrderedDict()

    def replace(self, versions: Iterable[AdapterVersion]) -> None:
        """Take the registry's whole list."""
        self._latest = {version.name: version for version in versions}
        self.synced = True

    def learn(self, version: AdapterVersion) -> None:
        """Take one version that the registry told of, and what points to it."""
        aliases = [f"{version.name}@{alias}" for alias in version.aliases if alias != LATEST]
        digest = str(AdapterRef(digest=version.digest, owner=tenant_of(version.name)))
        for key in (digest, spelling_of(version), *aliases):
            # Events arrive after answers: what was must not come back.
            if _is_newer(version, self._remembered.get(key)):
                self._remembered[key] = version
            self._remembered.move_to_end(key)
        while len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        if LATEST in version.aliases and _is_newer(version, self._latest.get(version.name)):
            self._latest[version.name] = version

    def forget_alias(self, name: str, alias: str) -> None:
        """Drop an alias that points nowhere."""
        self._remembered.pop(f"{name}@{alias}", None)

    def forget(self, name: str, version: int | None = None) -> bool:
        """Drop a deleted name, or one version of it; return whether the name's latest is now unknown."""
        gone = [
            key
            for key, known in self._remembered.items()
            if known.name == name and version in (None, known.version)
        ]
        for key in gone:
            del self._remembered[key]
        latest = self._latest.get(name)
        if latest is None or version not in (None, latest.version):
            return False
        del self._latest[name]
        return version is not None

    def apply(self, event: WatchAdaptersResponse) -> bool:
        """Take one event; return whether the latest version of its name must be asked for."""
        if event.type in _TOLD_WHOLE:
            self.learn(event.adapter)
        elif event.type == AdapterEventType.ADAPTER_EVENT_TYPE_ALIAS_REMOVED:
            self.forget_alias(event.adapter.name, event.alias)
        elif event.type == AdapterEventType.ADAPTER_EVENT_TYPE_VERSION_DELETED:
            return self.forget(event.adapter.name, event.adapter.version)
        elif event.type == AdapterEventType.ADAPTER_EVENT_TYPE_ADAPTER_DELETED:
            self.forget(event.adapter.name)
        return False

    def find(self, ref: AdapterRef) -> AdapterVersion | None:
        """The version a spelling stood for when last heard of."""
        if ref.is_latest:
            return self._latest.get(ref.name)
        by_name = self._latest.get(ref.name)
        if by_name is not None and by_name.version == ref.version:
            return by_name
        return self._remembered.get(str(ref)) or next(
            (
                version
                for version in self._latest.values()
                if ref.digest and (version.digest, tenant_of(version.name)) == (ref.digest, ref.owner)
            ),
            None,
        )

    def versions(self, included: Callable[[str], bool] = _any) -> list[AdapterVersion]:
        """The latest version of each name that is included, in order of names."""
        return [self._latest[name] for name in sorted(filter(included, self._latest))]

    def near(self, spelling: str, *others: str, included: Callable[[str], bool] = _any) -> str:
        """What looks most like a misspelled name: one of the included, as its tenant calls it, or of the others.

        "" if none does.
        """
        # Comparing is quadratic in length and linear in names: bounded for what strangers may send.
        names = islice(filter(included, self._latest), _MAX_REMEMBERED)
        candidates = [*others, *map(local_name, names)]
        matches = difflib.get_close_matches(spelling[:128], candidates, n=1)
        return matches[0] if matches else ""
