"""The inference services behind this gateway: found, followed, and chosen from."""

import asyncio
import contextlib
from collections.abc import Callable, Collection

import grpc
from softprompt_api.errors import Unavailable
from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.names import shown

from softprompt_gateway.bases import Bases, fingerprint
from softprompt_gateway.disconnect import stop
from softprompt_gateway.discovery import Discovery
from softprompt_gateway.placement import rank
from softprompt_gateway.replica import Replica

LOOK_UP_S = 5.0
# How long the first requests wait until it is known of every replica whether it serves.
_FIRST_LOOK_S = 2.0


class Replicas:
    """Replicas, followed from the start; needs a running event loop.

    Args:
        discovery: finds them.
        connect: opens a channel to an address.
        look_up_s: between looks for others, where a name is looked up.
    """

    def __init__(
        self,
        discovery: Discovery,
        connect: Callable[[str], grpc.aio.Channel],
        *,
        look_up_s: float = LOOK_UP_S,
    ) -> None:
        self._discovery = discovery
        self._connect = connect
        self._look_up_s = look_up_s
        self._replicas: dict[str, Replica] = {}
        self._retiring: dict[Replica, asyncio.Task[None]] = {}
        self._bases = Bases()
        self._is_closed = False
        self._take_over()
        self._following = asyncio.create_task(self._follow())
        self._looked_at = asyncio.create_task(self._take_a_look())

    @property
    def every(self) -> list[Replica]:
        """All of them, whether they serve or not."""
        return list(self._replicas.values())

    def serving(self) -> list[Replica]:
        """Those that serve now; Unavailable where none does."""
        serving = [replica for replica in self.every if replica.is_up]
        if not serving:
            raise _unavailable()
        return serving

    @property
    def known_bases(self) -> Bases:
        """What replicas have told by now that they serve; none before the first of them has."""
        return self._bases

    async def bases(self) -> Bases:
        """What replicas have told that they serve, those that are away now included.

        Waits until all were looked at; Unavailable while nothing is known.
        """
        await self.look_at_all()
        if not self._bases:
            raise _unavailable()
        return self._bases

    async def look_at_all(self) -> None:
        """Return once it was found out which replicas serve, or that some do not answer."""
        if not self._looked_at.done():
            await asyncio.shield(self._looked_at)

    def choose(
        self,
        served: GetModelResponse,
        key: Callable[[], bytes],
        *,
        adds: int = 1,
        but: Collection[Replica] = (),
    ) -> Replica:
        """The replica of a base model that takes a request; Unavailable where there is none.

        Args:
            key: what the request is placed by; asked for where there is a choice.
            adds: how many choices it has.
            but: replicas that could not do it.
        """
        fit = (
            [] if self._is_closed else [replica for replica in self.every if replica.is_up and replica not in but]
        )
        wanted = fingerprint(served.base_model)
        fit = [replica for replica in fit if replica.fingerprint == wanted]
        if not fit:
            raise _unavailable(served if self._bases.are_several else None)
        if len(fit) == 1:
            return fit[0]
        first = rank(key(), {replica.name: replica.load for replica in fit}, adds=adds)[0]
        return self._replicas[first]

    async def close(self) -> None:
        """Abort what runs and close all connections."""
        self._is_closed = True
        await stop(self._following, self._looked_at)
        every = [*self.every, *self._retiring]
        await stop(*self._retiring.values())
        await asyncio.gather(*[replica.close() for replica in every])

    async def _follow(self) -> None:
        while self._discovery.may_change:
            await asyncio.sleep(self._look_up_s)
            await self._discovery.refresh()
            self._take_over()

    async def _take_a_look(self) -> None:
        with contextlib.suppress(TimeoutError):  # one that does not answer is looked for on
            async with asyncio.timeout(_FIRST_LOOK_S):
                await self._discovery.refresh()
                self._take_over()
                for replica in self.every:
                    await replica.looked_at.wait()

    def _take_over(self) -> None:
        """Have the replicas that were found, and no others."""
        found = self._discovery.addresses
        for name in self._replicas.keys() - set(found):
            self._retire(self._replicas.pop(name))
        # In the order in which they were found, which is the same for all gateways.
        self._replicas = {name: self._replicas.get(name) or self._open(name) for name in found}
        self._learn()

    def _open(self, name: str) -> Replica:
        return Replica(name, self._connect(name), self._learn)

    def _retire(self, replica: Replica) -> None:
        task = self._retiring[replica] = asyncio.create_task(replica.retire())
        task.add_done_callback(lambda _: self._retiring.pop(replica))

    def _learn(self) -> None:
        # Of two that give different things one name, one that is up is meant.
        every = sorted(self.every, key=lambda replica: not replica.is_up)
        told = [replica.served for replica in every if replica.served is not None]
        self._bases = Bases(told, is_whole=len(told) == len(self._replicas))


def _unavailable(served: GetModelResponse | None = None) -> Unavailable:
    of = f" of the base model {shown(served.base_model.id, 256)}" if served is not None else ""
    return Unavailable(f"the inference service{of} is not available; try again")
