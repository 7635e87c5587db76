"""What several routes do to adapters: told to the audit log, and then to the parts that know of adapters."""

from softprompt_api.audit import audited
from softprompt_api.errors import AdapterNotFound, InvalidArgument, Unavailable
from softprompt_api.names import AdapterRef, parse_adapter, shown
from softprompt_api.registry.v1.registry_pb2 import (
    AdapterVersion,
    ImportAdapterRequest,
    ImportAdapterResponse,
)
from starlette.requests import Request

from softprompt_gateway.caller import Caller
from softprompt_gateway.disconnect import unless_gone
from softprompt_gateway.gateway import Gateway


def plain_name(adapter: str) -> AdapterRef:
    """A name as a caller spells it; InvalidArgument for a version of it, or a digest."""
    ref = parse_adapter(adapter)
    if ref.digest or "@" in adapter:
        raise InvalidArgument("a plain adapter name is expected here, without a version", field="adapter")
    return ref


class Changes:
    """Imports and deletes adapters, over one gateway's parts."""

    def __init__(self, gateway: Gateway) -> None:
        self._registry = gateway.clients.registry
        self._inference = gateway.clients.inference
        self._catalog = gateway.catalog
        self._probing = gateway.probing

    async def default_base(self) -> str:
        """The id of the base model that an adapter is for where nothing is said; "": the registry must know."""
        try:
            return (await self._inference.bases()).sole_id
        except Unavailable:
            return ""

    async def import_(
        self, request: Request, call: ImportAdapterRequest, *, must_be_new: bool = False
    ) -> ImportAdapterResponse:
        """Have the registry read an adapter from a source.

        Args:
            call: its name is the one that the caller knows the adapter by.
            must_be_new: whether a name that is there already is an InvalidArgument.
        """
        caller, name = Caller.of(request), call.name
        with audited("adapter.import", adapter=shown(name), source=shown(call.source), **caller.facts()):
            call.name = caller.new_name(name)
            call.base_model_id = call.base_model_id or await self.default_base()
            if must_be_new:
                await self._check_absent(call.name, name)
            moment = self._catalog.moment
            answer = await unless_gone(request, self._registry.import_adapter(call))
        self.registered(answer.adapter, asked_at=moment)
        return answer

    async def _check_absent(self, full_name: str, name: str) -> None:
        try:
            await self._registry.get_adapter(full_name)
        except AdapterNotFound:
            return
        raise InvalidArgument(
            f"the adapter {shown(name)} has already been loaded; load_inplace makes a new version of it",
            field="name",
        )

    def registered(self, version: AdapterVersion, *, asked_at: int) -> None:
        """Have a new version listed, and measured later.

        Args:
            asked_at: the catalogue's `moment` before it was made.
        """
        # The watch brings it too, a moment later; a listing right after this answer must have it.
        self._catalog.learn(version, asked_at=asked_at)
        self._probing.want(version)

    async def delete(self, caller: Caller, asked: AdapterRef) -> int:
        """Delete a name with all its versions, or one version; return how many these were."""
        with audited("adapter.delete", adapter=str(asked), **caller.facts()):
            ref, moment = caller.own(asked), self._catalog.moment
            if ref.version is None:
                num_deleted = await self._registry.delete_adapter(ref.name)
            else:
                await self._registry.delete_version(ref.name, ref.version)
                num_deleted = 1
        self._catalog.forget(ref.name, ref.version, asked_at=moment)
        return num_deleted
