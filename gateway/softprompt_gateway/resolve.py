"""What a request's `model` stands for, decided anew for every request."""

import asyncio
import time
from dataclasses import dataclass

from softprompt_api import errors
from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.names import choose_task, parse_model, shown, with_task
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion

from softprompt_gateway.caller import Caller
from softprompt_gateway.catalog import Catalog, spelling_of
from softprompt_gateway.clients import InferenceClient, RegistryClient
from softprompt_gateway.errors import ModelNotFound

_MODEL_FRESH_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The one thing a request is computed with.

    Attributes:
        model: as the request spelled it.
        served: the base model and its limits.
        adapter: the adapter version, by its tenant's name for it; None: the base model alone.
        task: one of the adapter's tasks; None where it has none.
        caller: who asked for it.
    """

    model: str
    served: GetModelResponse
    adapter: AdapterVersion | None
    task: int | None = None
    caller: Caller

    @property
    def digest(self) -> str:
        """The adapter as the inference service is told; "" for the base model."""
        return with_task(self.adapter.digest, self.task) if self.adapter else ""

    def headers(self) -> dict[str, str]:
        """Response headers that say which version answered."""
        if self.adapter is None:
            return {}
        return {
            "x-softprompt-adapter": with_task(spelling_of(self.adapter), self.task),
            "x-softprompt-adapter-digest": self.digest,
        }


class Resolver:
    """Turns `model` into a Target.

    The registry is asked every time, so that the request after a registration gets what was registered. While it
    is away, what the catalogue last heard is used.
    """

    def __init__(self, registry: RegistryClient, inference: InferenceClient, catalog: Catalog) -> None:
        self._registry = registry
        self._inference = inference
        self._catalog = catalog
        self._served: GetModelResponse | None = None
        self._served_until_s = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def served(self) -> GetModelResponse:
        """The base model, as last told by an inference service that answers."""
        if self._served is None or time.monotonic() >= self._served_until_s:
            # One question for all requests that wait; one of them leaving does not end it.
            self._asking = self._asking or asyncio.create_task(self._ask())
            await asyncio.shield(self._asking)
        assert self._served is not None
        return self._served

    async def _ask(self) -> None:
        try:
            self._served = await self._inference.model()
        except errors.SoftpromptError:
            if self._served is None:
                raise
        finally:
            self._asking = None
        self._served_until_s = time.monotonic() + _MODEL_FRESH_S

    async def resolve(self, model: str, caller: Caller) -> Target:
        """Find what `model` spells for a caller.

        Raises ModelNotFound, with a near name, where there is no such model or it is another tenant's,
        PermissionDenied where the key may not use it, and InvalidArgument for a task that the adapter does not
        have.
        """
        served = await self.served()
        base_id = served.base_model.id
        try:
            asked = parse_model(model, base_model_id=base_id)
            if asked is None:
                return Target(model=model, served=served, adapter=None, caller=caller)
            ref = caller.own(asked)
        except (errors.InvalidArgument, errors.AdapterNotFound):
            raise self._not_found(model, base_id, caller) from None
        try:
            version = await self._registry.get_adapter(str(ref.whole))
        except errors.AdapterNotFound:
            raise self._not_found(model, base_id, caller) from None
        except (errors.Unavailable, errors.DeadlineExceeded):
            known = self._catalog.find(ref.whole)
            if known is None:
                raise
            version = known
        else:
            self._catalog.learn(version)
        caller.check_use(version.name)
        task = choose_task(asked, version.num_tasks, field="model")
        return Target(model=model, served=served, adapter=caller.told(version), task=task, caller=caller)

    def _not_found(self, model: str, base_id: str, caller: Caller) -> ModelNotFound:
        near = self._catalog.near(model.removeprefix(f"{base_id}:"), base_id, included=caller.may_use)
        hint = f"; did you mean {shown(near, 256)}?" if near else "; GET /v1/models lists what there is"
        return ModelNotFound(f"the model {shown(model)} does not exist{hint}")
