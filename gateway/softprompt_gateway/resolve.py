"""What a request's `model`, and the soft prompts inside its prompt, stand for: decided anew for every request."""

import asyncio
import contextvars
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from softprompt_api import errors
from softprompt_api.composition import Part, check_front, check_inside, check_number, role_of
from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.names import (
    AdapterRef,
    choose_task,
    join_model,
    parse_requested,
    shown,
    with_task,
)
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion
from softprompt_api.tracing import span

from softprompt_gateway.bases import Bases, fingerprint
from softprompt_gateway.caller import Caller
from softprompt_gateway.catalog import Catalog, spelling_of
from softprompt_gateway.clients import InferenceClient, RegistryClient
from softprompt_gateway.disconnect import stop
from softprompt_gateway.errors import ModelNotFound
from softprompt_gateway.lease import Lease
from softprompt_gateway.placement import Place

# A question that fails sooner keeps no request waiting.
_LONG_S = 0.1
# Some kilobytes each.
_MAX_FOUND = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What a request names.

    Attributes:
        model: as the request spells it.
        adapters: the request's own list of what else `model` would join with '+'.
        inside: soft prompts inside the prompt.
        prompt_field: the request's field that names these.
    """

    model: str
    caller: Caller
    adapters: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    prompt_field: str = "prompt"

    @property
    def front_field(self) -> str:
        """The field that names the adapters in front."""
        return "adapters" if self.adapters else "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One adapter of a request: the version that answers, and its task where it has tasks."""

    version: AdapterVersion
    task: int | None

    @property
    def spelling(self) -> str:
        """`name@version`, with the task."""
        return with_task(spelling_of(self.version), self.task)

    @property
    def digest(self) -> str:
        """The adapter as the inference service is told."""
        return with_task(self.version.digest, self.task)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a request is computed with; requests that name the same may share it.

    Attributes:
        model: as the request spelled it.
        served: the base model and its limits.
        front: the adapters of `model` or of `adapters`, in order; none: the base model alone.
        inside: the soft prompts inside the prompt, by their spelling there.
        caller: who asked for it. The adapters have the names that it knows them by.
    """

    model: str
    served: GetModelResponse
    caller: Caller
    front: Sequence[Bound] = ()
    inside: Mapping[str, Bound] = field(default_factory=dict)

    @functools.cached_property
    def adapters(self) -> Sequence[Bound]:
        """Every adapter of the request, as responses name them: those in front, then each further one inside."""
        in_front = {bound.digest for bound in self.front}
        further = {bound.digest: bound for bound in self.inside.values() if bound.digest not in in_front}
        return [*self.front, *further.values()]

    @functools.cached_property
    def digest(self) -> str:
        """The adapters in front as the inference service is told; "" for the base model."""
        return join_model(bound.digest for bound in self.front)

    @property
    def digests_inside(self) -> Mapping[str, str]:
        """The soft prompts inside the prompt as the inference service is told, by their spelling there."""
        return {spelling: bound.digest for spelling, bound in self.inside.items()}

    def is_same(self, other: "Target") -> bool:
        """Whether a request is computed alike, and its answer names the same, with either."""
        return self._identity() == other._identity()

    def _identity(self) -> tuple[object, ...]:
        bound = [(one.spelling, one.digest) for one in (*self.front, *self.inside.values())]
        return fingerprint(self.served.base_model), len(self.front), bound, tuple(self.inside)

    @functools.cached_property
    def facts(self) -> Mapping[str, str]:
        """For the request's log line."""
        adapters = join_model(bound.spelling for bound in self.adapters)
        return {"model": self.model, **({"adapters": adapters} if adapters else {})}

    @functools.cached_property
    def place(self) -> Place:
        """Where the request is computed: with others that have its first adapter."""
        first = next(iter(self.front or self.inside.values()), None)
        return Place(served=self.served, digest=first.digest if first is not None else "")

    @functools.cached_property
    def headers(self) -> Mapping[str, str]:
        """Response headers that say which versions answered."""
        adapters = self.adapters
        if not adapters:
            return {}
        return {
            "x-softprompt-adapter": join_model(bound.spelling for bound in adapters),
            "x-softprompt-adapter-digest": join_model(bound.digest for bound in adapters),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One adapter as a request spells it, and the field that does."""

    spelling: str
    field: str
    ref: AdapterRef


class _Missing(Exception):
    """There is no such adapter, for the caller."""

    def __init__(self, asked: _Asked) -> None:
        super().__init__(asked.spelling)
        self.asked = asked


class Resolver:
    """Turns what a request names into a Target.

    The registry is asked, or its lease is held, so that the request after a registration gets what was registered.
    While it is away, what the catalogue last heard is used: at once, once a question has waited for that and until
    one is answered. What is `known` may be begun with, and answered with where `knows_all`.
    """

    def __init__(
        self, registry: RegistryClient, inference: InferenceClient, catalog: Catalog, lease: Lease
    ) -> None:
        self._registry = registry
        self._inference = inference
        self._catalog = catalog
        self._lease = lease
        self._looking: asyncio.Task[None] | None = None  # for a registry that takes long to be away
        # By all that it depends on.
        self._found = functools.lru_cache(_MAX_FOUND)(self._find)

    async def close(self) -> None:
        """Look for the registry no more."""
        if self._looking is not None:
            await stop(self._looking)

    async def bases(self) -> Bases:
        """The base models; Unavailable before the first of them is known."""
        return await self._inference.bases()

    async def served(self) -> GetModelResponse:
        """The base model of requests that name none; InvalidArgument where there are several."""
        return (await self.bases()).only()

    async def resolve(self, named: Named) -> Target:
        """Find what a request of a caller names.

        Raises ModelNotFound, with a near name, where there is no such model or adapter, or it is another tenant's;
        PermissionDenied where the key may not use one; InvalidArgument where an adapter does not have the task, or
        adapters do not go together or with the base model; and BaseModelUnknown where no replica serves an
        adapter's.
        """
        bases = await self.bases()
        base, front, inside = self._parse_all(named, bases)
        # One request never has two versions of one name: each is asked for once.
        first = {asked.ref.whole: asked for asked in reversed([*front, *inside])}
        with span("resolve"):
            try:
                versions = await asyncio.gather(*(self._version_of(asked, named) for asked in first.values()))
            except _Missing as missing:  # one of them; a near name is looked for once
                raise self._not_found(missing.asked.spelling, missing.asked.field, named, bases) from None
        return _target(named, bases, base, front, inside, dict(zip(first, versions, strict=True)))

    def knows_all(self) -> bool:
        """Whether what is `known` in this turn of the event loop is what there is."""
        return self._lease.is_held()

    def known(self, named: Named) -> Target | None:
        """The same by what was last heard, without asking anybody; None where that is not enough to answer.

        Raises ModelNotFound for what can be no name.
        """
        bases = self._inference.known_bases
        try:
            return self._found(named, bases, self._catalog.state) if bases else None
        except (errors.SoftpromptError, _Missing):
            return None

    def _find(self, named: Named, bases: Bases, _state: tuple[int, int]) -> Target:
        """What is known of it; it raises otherwise, so that nothing is kept of what strangers make up."""
        base, front, inside = self._parse_all(named, bases)
        versions: dict[AdapterRef, AdapterVersion] = {}
        for asked in (*front, *inside):
            whole = named.caller.own(asked.ref.whole)
            # A digest may have to be looked for among all that there is, which takes longer than a question.
            version = None if whole.digest else self._catalog.find(whole)
            if version is None:
                raise _Missing(asked)
            versions[asked.ref.whole] = _told(version, named.caller)
        return _target(named, bases, base, front, inside, versions)

    def _parse_all(self, named: Named, bases: Bases) -> tuple[GetModelResponse | None, list[_Asked], list[_Asked]]:
        """The base model that is named, the adapters in front, and those inside the prompt."""
        base, in_model = bases.split(named.model)
        if in_model and named.adapters:
            base_ids = " or ".join(repr(id_) for id_ in bases.ids)
            raise errors.InvalidArgument(
                f"model names adapters already; name all of them there, joined by '+', or make model {base_ids}",
                field="adapters",
            )
        check_number(len(in_model), field="model")
        front = [self._parse(name, "model", named, bases) for name in in_model]
        front += [self._parse(name, "adapters", named, bases) for name in named.adapters]
        inside = [self._parse(name, named.prompt_field, named, bases) for name in dict.fromkeys(named.inside)]
        check_number(len(front) + len(inside), field=named.front_field if front else named.prompt_field)
        return base, front, inside

    def _parse(self, spelling: str, field: str, named: Named, bases: Bases) -> _Asked:
        try:
            return _Asked(spelling=spelling, field=field, ref=parse_requested(spelling, field=field))
        except errors.InvalidArgument:
            raise self._not_found(spelling, field, named, bases) from None

    async def _version_of(self, asked: _Asked, named: Named) -> AdapterVersion:
        try:
            return _told(await self._current(named.caller, asked.ref.whole), named.caller)
        except errors.AdapterNotFound:
            raise _Missing(asked) from None

    async def _current(self, caller: Caller, ref: AdapterRef) -> AdapterVersion:
        whole = caller.own(ref)
        # As in `known`, digests are asked for.
        if not whole.digest and self.knows_all() and (sure := self._catalog.find(whole)) is not None:
            return sure
        if self._looking is not None and not self._looking.done():
            known = self._catalog.find(whole, caller.may_use)
            if known is not None:
                return known
        moment, asked_s = self._catalog.moment, time.monotonic()
        try:
            version = await self._registry.get_adapter(str(whole))
        except (errors.Unavailable, errors.DeadlineExceeded):
            if time.monotonic() - asked_s > _LONG_S:
                self._look_for_registry(str(whole))
            known = self._catalog.find(whole, caller.may_use)
            if known is None:
                raise
            return known
        self._catalog.learn(version, asked_at=moment)
        return self.usable(caller, ref, version)

    def usable(self, caller: Caller, ref: AdapterRef, version: AdapterVersion) -> AdapterVersion:
        """What the registry answered, or the same files under another name, where the key may not use that one.

        AdapterNotFound where it may use none of the names: it is told of none.
        """
        if not ref.digest or caller.may_use(version.name):
            return version
        known = self._catalog.find(caller.own(ref), caller.may_use)
        if known is None:
            raise errors.AdapterNotFound(f"there is no adapter {shown(str(ref))}", field="adapter")
        return known

    def _look_for_registry(self, spelling: str) -> None:
        if self._looking is None or self._looking.done():
            # For all: in no request's context.
            self._looking = asyncio.create_task(self._ask_until_answered(spelling), context=contextvars.Context())

    async def _ask_until_answered(self, spelling: str) -> None:
        asked_s = -math.inf
        while time.monotonic() - asked_s > _LONG_S:  # or it is away in such a way that nobody waits for it
            asked_s = time.monotonic()
            try:
                await self._registry.get_adapter(spelling)
            except (errors.Unavailable, errors.DeadlineExceeded):
                continue
            except errors.SoftpromptError:
                pass  # an answer too
            return

    def _not_found(self, spelling: str, field: str, named: Named, bases: Bases) -> ModelNotFound:
        caller = named.caller
        near = self._catalog.near(spelling, *bases.ids, tenant=caller.tenant, included=caller.may_use)
        hint = f"; did you mean {shown(near, 256)}?" if near else "; GET /v1/models lists what there is"
        if field != "model":
            return ModelNotFound(f"the adapter {shown(spelling)} does not exist{hint}", param=field)
        one_of = f": there is no adapter {shown(spelling)}" if "+" in named.model else ""
        return ModelNotFound(f"the model {shown(named.model)} does not exist{one_of}{hint}")


def _told(version: AdapterVersion, caller: Caller) -> AdapterVersion:
    caller.check_use(version.name)
    return caller.told(version)


def _common_base(
    named: GetModelResponse | None, bound: Sequence[tuple[_Asked, Bound]], bases: Bases
) -> GetModelResponse:
    """The base model that `model` names, or else its adapters are for; InvalidArgument: one is for another."""
    own = [bases.of(one.version) for _, one in bound]
    first = own[0] if own else named
    assert first is not None, "a request without adapters names its base model"
    wanted_id = (first if named is None else named).base_model.id
    for (asked, _), base in zip(bound, own, strict=True):
        if base.base_model.id != wanted_id:
            raise errors.InvalidArgument(
                f"the adapter {shown(asked.spelling, 128)} is for the base model "
                f"{shown(base.base_model.id, 256)}, and the request is for {shown(wanted_id, 256)}",
                field=asked.field,
            )
    return first


def _target(
    named: Named,
    bases: Bases,
    base: GetModelResponse | None,
    front: Sequence[_Asked],
    inside: Sequence[_Asked],
    versions: Mapping[AdapterRef, AdapterVersion],
) -> Target:
    in_front, within = (
        [(asked, _bind(asked, versions[asked.ref.whole])) for asked in some] for some in (front, inside)
    )
    served = _common_base(base, [*in_front, *within], bases)
    check_front([_part(asked, bound) for asked, bound in in_front], field=named.front_field)
    check_inside([_part(asked, bound) for asked, bound in within], field=named.prompt_field)
    return Target(
        model=named.model,
        served=served,
        caller=named.caller,
        front=[bound for _, bound in in_front],
        inside={asked.spelling: bound for asked, bound in within},
    )


def _bind(asked: _Asked, version: AdapterVersion) -> Bound:
    return Bound(version=version, task=choose_task(asked.ref, version.num_tasks, field=asked.field))


def _part(asked: _Asked, bound: Bound) -> Part:
    return Part(name=str(asked.ref), role=role_of(bound.version.kind))
