"""The adapters that this gateway has heard of: for listings, near names, and requests that need ask nobody."""

import asyncio
import contextlib
import difflib
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator

from softprompt_api.names import LATEST, AdapterRef
from softprompt_api.registry.v1.registry_pb2 import (
    AdapterEventType,
    AdapterVersion,
    WatchAdaptersResponse,
)
from softprompt_api.tenants import DEFAULT_TENANT, local_name, tenant_of

from softprompt_gateway.bases import SHAPE

_MAX_REMEMBERED = 4096
_MAX_COMPARED = 64

# A version without its config and its labels, serialised: some 300 bytes, where a parsed message takes thousands.
Packed = bytes

_TOLD_WHOLE = (
    AdapterEventType.ADAPTER_EVENT_TYPE_REGISTERED,
    AdapterEventType.ADAPTER_EVENT_TYPE_ALIAS_SET,
    AdapterEventType.ADAPTER_EVENT_TYPE_UPDATED,
)


def spelling_of(version: AdapterVersion) -> str:
    """`name@version`, which stands for this content for ever."""
    return f"{version.name}@{version.version}"


def pack(version: AdapterVersion) -> Packed:
    """What listings and requests need of a version."""
    kept = AdapterVersion()
    kept.CopyFrom(version)
    kept.ClearField("config_json")
    kept.ClearField("labels")
    if version.HasField("base_model"):
        kept.ClearField("base_model")
        for name in ("id", *SHAPE):
            setattr(kept.base_model, name, getattr(version.base_model, name))
    return kept.SerializeToString()


def _unpack(packed: Packed | None) -> AdapterVersion | None:
    return None if packed is None else AdapterVersion.FromString(packed)


def _place(name: str) -> tuple[str, str]:
    """Where a full name stands in the order of names: beside its tenant's others."""
    return tenant_of(name), local_name(name)


def _is_newer(version: AdapterVersion, packed: Packed | None) -> bool:
    """Whether nothing later is known under the same key; revisions of different names do not compare."""
    known = _unpack(packed)
    return known is None or known.name != version.name or known.revision <= version.revision


def _any(_name: str) -> bool:
    return True


class Catalog:
    """The latest version of every name, and versions that were asked for lately.

    Attributes:
        synced: whether everything the registry has was listed.
        cursor: all its changes up to here are known; "" before that.
    """

    def __init__(self) -> None:
        self.synced = False
        self.cursor = ""
        self._has_moved = asyncio.Event()
        self._latest: dict[str, Packed] = {}
        self._names: list[str] = []  # of `_latest`, in order
        # By tenant/digest and by name@version, which mean one content for ever, and by name@alias.
        self._remembered: OrderedDict[str, Packed] = OrderedDict()
        self._num_learned = 0
        self._num_forgotten = 0
        # By name, what the number was when something of it was last forgotten; of other names at most
        # `_all_forgotten`.
        self._forgotten: OrderedDict[str, int] = OrderedDict()
        self._all_forgotten = 0

    def __len__(self) -> int:
        return len(self._latest)

    def replace(self, latest: dict[str, Packed]) -> None:
        """Take the registry's whole list: each name's latest version. What else was known may be no more."""
        self._latest = latest
        self._remembered.clear()
        self._forgotten.clear()
        self._num_forgotten += 1
        self._all_forgotten = self._num_forgotten
        self._names = sorted(latest, key=_place)
        self.synced = True

    def take(self, cursor: str) -> None:
        """All changes up to here are known from now on."""
        if cursor != self.cursor:
            self.cursor = cursor
            self._has_moved.set()

    async def wait_beyond(self, cursor: str, *, patience_s: float) -> None:
        """Return when other changes than those up to here are known, or the patience has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while self.cursor == cursor:
                    self._has_moved.clear()
                    await self._has_moved.wait()

    @property
    def state(self) -> tuple[int, int]:
        """Another one whenever something else is known."""
        return self._num_learned, self._num_forgotten

    @property
    def moment(self) -> int:
        """When something is asked for or changed; see `learn` and `forget`."""
        return self._num_forgotten

    def learn(self, version: AdapterVersion, *, asked_at: int | None = None) -> bool:
        """Take one version that the registry told of, and what points to it; whether it could be taken.

        Args:
            asked_at: the `moment` before it was asked for; what is known to be deleted since does not come back.
        """
        if self._has_forgotten(version.name, asked_at):
            return False
        packed = pack(version)
        aliases = [f"{version.name}@{alias}" for alias in version.aliases if alias != LATEST]
        digest = str(AdapterRef(digest=version.digest, owner=tenant_of(version.name)))
        for key in (digest, spelling_of(version), *aliases):
            known = self._remembered.get(key)
            # Events arrive after answers: what was must not come back.
            if known != packed and _is_newer(version, known):
                self._remembered[key] = packed
                self._num_learned += 1
            self._remembered.move_to_end(key)
        while len(self._remembered) > _MAX_REMEMBERED:
            # Without it, an answer on its way would not be compared with what was later than it.
            self._note_forgotten(AdapterVersion.FromString(self._remembered.popitem(last=False)[1]).name)
        known = self._latest.get(version.name)
        if LATEST in version.aliases and known != packed and _is_newer(version, known):
            if known is None:
                insort(self._names, version.name, key=_place)
            self._latest[version.name] = packed
            self._num_learned += 1
        return True

    def forget_alias(self, name: str, alias: str, *, asked_at: int | None = None) -> None:
        """Drop an alias that points nowhere; `asked_at` as in `forget`."""
        if self._has_forgotten(name, asked_at):
            return
        self._note_forgotten(name)
        self._remembered.pop(f"{name}@{alias}", None)

    def forget(self, name: str, version: int | None = None, *, asked_at: int | None = None) -> None:
        """Drop a deleted name, or one version of it.

        Args:
            asked_at: the `moment` before it was deleted; if that is known by now, what came after it stays. No
                version comes after another under its number.
        """
        if version is None and self._has_forgotten(name, asked_at):
            return
        self._note_forgotten(name)
        text = name.encode()
        for key in [key for key, packed in self._remembered.items() if text in packed]:
            known = AdapterVersion.FromString(self._remembered[key])
            if known.name == name and version in (None, known.version):
                del self._remembered[key]
        latest = _unpack(self._latest.get(name))
        if latest is not None and version in (None, latest.version):
            del self._latest[name]
            del self._names[bisect_left(self._names, _place(name), key=_place)]

    def _has_forgotten(self, name: str, asked_at: int | None) -> bool:
        """Whether something of a name was forgotten since a moment, or may have been."""
        return asked_at is not None and self._forgotten.get(name, self._all_forgotten) > asked_at

    def _note_forgotten(self, name: str) -> None:
        self._num_forgotten += 1
        self._forgotten[name] = self._num_forgotten
        self._forgotten.move_to_end(name)
        if len(self._forgotten) > _MAX_REMEMBERED:
            _, self._all_forgotten = self._forgotten.popitem(last=False)

    def apply(self, event: WatchAdaptersResponse) -> bool:
        """Take one event; return whether the latest version of its name must be asked for."""
        if event.type in _TOLD_WHOLE:
            if not event.adapter.digest:  # it cannot be read: what its aliases were is not what they are
                self.forget(event.adapter.name)
                return True
            self.learn(event.adapter)
            return self._has_moved_on(event)
        if event.type == AdapterEventType.ADAPTER_EVENT_TYPE_ALIAS_REMOVED:
            self.forget_alias(event.adapter.name, event.alias)
        elif event.type == AdapterEventType.ADAPTER_EVENT_TYPE_VERSION_DELETED:
            self.forget(event.adapter.name, event.adapter.version)
            # It may be gone already: by the same event, where nobody could be asked, or by the deletion itself.
            # And another one seems to be the latest where what made this one it was not told.
            return event.alias == LATEST or event.adapter.name not in self._latest
        elif event.type == AdapterEventType.ADAPTER_EVENT_TYPE_ADAPTER_DELETED:
            self.forget(event.adapter.name)
        return False

    def _has_moved_on(self, event: WatchAdaptersResponse) -> bool:
        """Drop what an event made an alias point to where that is over, and not told yet; whether it is `latest`.

        Versions are told as they are by now, and not as they were at the time of the event.
        """
        is_registration = event.type == AdapterEventType.ADAPTER_EVENT_TYPE_REGISTERED
        alias = LATEST if is_registration else event.alias
        if not alias or alias in event.adapter.aliases:
            return False
        if alias != LATEST:
            self.forget_alias(event.adapter.name, alias)
        return alias == LATEST

    def find(self, ref: AdapterRef, included: Callable[[str], bool] = _any) -> AdapterVersion | None:
        """The version a spelling stood for when last heard of, without its config and labels.

        Args:
            included: which of the names that have the same digest may be found.
        """
        latest = _unpack(self._latest.get(ref.name))
        if ref.is_latest:
            return latest
        if latest is not None and latest.version == ref.version:
            return latest
        found = _unpack(self._remembered.get(str(ref)))
        return found if found is not None and included(found.name) else self._with_digest(ref, included)

    def _with_digest(self, ref: AdapterRef, included: Callable[[str], bool]) -> AdapterVersion | None:
        if not ref.digest:
            return None
        # Looked for among the bytes first: parsing all of a large catalogue takes long.
        text = ref.digest.encode()
        candidates = (AdapterVersion.FromString(packed) for packed in self._latest.values() if text in packed)
        wanted = ref.digest, ref.owner
        same = (version for version in candidates if (version.digest, tenant_of(version.name)) == wanted)
        return next((version for version in same if included(version.name)), None)

    def versions(self, included: Callable[[str], bool] = _any) -> Iterator[AdapterVersion]:
        """The latest version of each included name, in order; changes meanwhile are seen, or not."""
        for name in filter(included, list(self._names)):
            if packed := self._latest.get(name):
                yield AdapterVersion.FromString(packed)

    def near(
        self,
        spelling: str,
        *others: str,
        tenant: str = DEFAULT_TENANT,
        included: Callable[[str], bool] = _any,
    ) -> str:
        """What looks most like a misspelled name: one of the tenant's that is included, or one of the others.

        It is as the tenant calls it; "" if none is alike.
        """
        spelling = spelling[:128]
        # Comparing is quadratic in length and linear in names: bounded for what strangers may send. Most words are
        # misspelled behind their first letters, and then they stand close to the right one.
        place = bisect_left(self._names, (tenant, spelling), key=_place)
        neighbours = self._names[max(0, place - _MAX_COMPARED // 2) : place + _MAX_COMPARED // 2]
        own = [local_name(name) for name in neighbours if tenant_of(name) == tenant and included(name)]
        matches = difflib.get_close_matches(spelling, [*others, *own], n=1)
        return matches[0] if matches else ""
