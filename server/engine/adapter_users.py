"""Who uses which adapter, and how an adapter is taken out of use while requests run with it.

    retire ──> the name is forgotten: new requests are refused ──> running ones end ──> nobody uses it: freed
                                                                     │
                               force: after `wait_s` they are ended, and who comes late is refused

Requests hold on to a revision, so an adapter that was replaced meanwhile has users under the name and the old
revision; they count as users of the name. A revision that another name means as well stays in memory.

A request that still waits for its prompt to be tokenised holds the adapter but is not known here. Only that
it is held is seen, in memory that is not free; hence the look that is taken now and then.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Protocol

from adapters.names import shown
from adapters.types import UNREAD, AdapterInfo, AdapterRef, AdapterStatus, Unloaded
from server.engine.generation import Generation
from server.types import Retired

_LOOK_S = 0.1  # how often what nobody tells is looked at
_CONFIRM_S = 5.0  # how long it may take the engine to let go of what was ended: some steps


class Registry(Protocol):
    """What has to be known of the names of adapters."""

    def list(self) -> tuple[AdapterInfo, ...]: ...
    def status(self, name: str) -> AdapterStatus | None: ...
    def is_loaded(self, ref: AdapterRef) -> bool: ...
    async def unload(self, name: str, *, force: bool = False) -> Unloaded | None: ...


class AdapterUsers:
    """The requests that the engine has, by adapter. Belongs to the event loop."""

    def __init__(self, end: Callable[[Generation, str], None]) -> None:
        """`end` ends a request with an error whose message its client may see."""
        self._end = end
        self._users: dict[AdapterRef, set[Generation]] = {}
        self._barred: set[AdapterRef] = set()  # those whose users are being ended
        self._waiters: set[asyncio.Future[None]] = set()  # for a user to leave

    def may_begin(self, refs: Iterable[AdapterRef]) -> bool:
        """Whether a request that uses them may be taken in: not while their users are being ended."""
        return self._barred.isdisjoint(refs)

    def add(self, generation: Generation) -> None:
        for ref in generation.adapters:
            self._users.setdefault(ref, set()).add(generation)

    def remove(self, generation: Generation) -> None:
        """The engine holds nothing of it any more."""
        for ref in generation.adapters:
            users = self._users[ref]
            users.remove(generation)
            if not users:
                del self._users[ref]
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def of(self, refs: Iterable[AdapterRef]) -> set[Generation]:
        return {user for ref in refs for user in self._users.get(ref, ())}

    async def retire(self, registry: Registry, name: str, *, force: bool, wait_s: float) -> Retired | None:
        """Forget the name at once and wait `wait_s` for its requests to end; with `force`, end the rest.

        None: nothing has the name, and no request uses what had it. If the caller is cancelled while it
        waits, the requests go on.
        """
        known = registry.status(name)
        unloaded = await registry.unload(name, force=force)
        used = {ref for ref in self._users if ref.name == name}
        if unloaded is None and not used:
            return None
        ref = next(iter(used)) if unloaded is None else AdapterRef(name, unloaded.revision or UNREAD)
        refs = {ref, *used}

        def is_held() -> bool:
            is_shared = any(other.ref.revision == ref.revision for other in registry.list())
            return bool(self.of(refs)) or (registry.is_loaded(ref) and not is_shared)

        freed_bytes = 0 if unloaded is None else unloaded.num_bytes
        was_loaded = registry.is_loaded(ref)
        await self._while(is_held, wait_s)
        ended: set[Generation] = set()
        if force and is_held():
            ended = self.of(refs)
            await self._force_out(refs, f"adapter {shown(name)} was removed from the server", is_held)
        if known is not None and was_loaded and not registry.is_loaded(ref):
            freed_bytes += known.info.num_bytes
        return Retired(
            ref=ref,
            freed_bytes=freed_bytes,
            ended=len(ended),
            users=max(len(self.of(refs)), is_held()),
        )

    async def _force_out(self, refs: set[AdapterRef], message: str, is_held: Callable[[], bool]) -> None:
        """End the users, and wait until the engine has let go of them."""
        self._barred |= refs
        try:
            for generation in self.of(refs):
                self._end(generation, message)
            await self._while(is_held, _CONFIRM_S)
        finally:
            self._barred -= refs

    async def _while(self, is_so: Callable[[], bool], limit_s: float) -> None:
        """As long as it is so, or until the time is over. Looks whenever a user leaves, and now and then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while is_so():
                    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiters.add(waiter)
                    try:
                        await asyncio.wait((waiter,), timeout=_LOOK_S)
                    finally:
                        self._waiters.discard(waiter)
