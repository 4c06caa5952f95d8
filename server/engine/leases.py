"""From what a request says about adapters to what it holds of them.

    a name   ──> acquired ──────────────────────────────────────────────> its lease
    a set    ──> all acquired, side by side ──> may be summed? ─────────> a lease for each, and the scales
    a merge  ──> all acquired, side by side ──> may be merged? ──> derived ──> the merged one's lease

Whatever goes wrong on the way, with one of five or with the client, nothing stays held. In the end a request
has one `LeaseSet`, however many adapters there are.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from adapters.errors import AdapterError
from adapters.names import shown
from adapters.recipes import MergeRecipe
from adapters.types import AdapterInfo, AdapterPart, AdapterRef, AdapterUse
from server.engine.refusals import refusal_of
from server.errors import BadRequest
from server.wishes import AdapterWish, MergeWish, PartWish

_PLAIN = frozenset(("rslora",))  # kinds that differ from plain LoRA in a factor only
_NOT_SUMMED = frozenset(("dora", "alora", "token_rows"))
"""What these do is no sum of something with the base: it cannot be scaled, or added to what others do."""

Merge = Callable[[MergeRecipe, Sequence[str], Sequence[Any]], Any]
"""Weights of several adapters to those of the merged one, given the adapters' names for messages. Runs in a
loader thread and raises AdapterError."""


class Lease(Protocol):
    """The right to use one revision of one adapter, until released."""

    @property
    def ref(self) -> AdapterRef: ...
    @property
    def info(self) -> AdapterInfo: ...
    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """Where in a prompt it begins to be active; empty: at the first token."""
        ...

    @property
    def extras(self) -> object | None:
        """What its folder has beside weights."""
        ...

    def release(self) -> None:
        """Synchronous and idempotent."""
        ...


class Registry(Protocol):
    """Where leases come from."""

    async def acquire(self, name: str, *, source: str | None = None, token: str | None = None) -> Lease:
        """Raises AdapterError."""
        ...

    async def derive(self, key: str, leases: Sequence[Any], build: Callable[[Sequence[Any]], Any]) -> Lease:
        """The adapter that `build` makes of those of the leases, which stay the caller's. It is made once for
        a key. Raises AdapterError.
        """
        ...


class LeaseSet:
    """The right to use what a request asked for, until released."""

    __slots__ = ("_leases", "extras", "invocation_tokens", "names", "source", "use")

    def __init__(
        self, use: AdapterUse, leases: Sequence[Lease], *, source: str, merged: Sequence[Lease] = ()
    ) -> None:
        """Takes the leases over, but not those of what was merged into them."""
        self.use = use
        self.names = tuple(lease.ref.name for lease in merged or leases)
        self.source = source
        self.invocation_tokens: tuple[int, ...] = ()
        self.extras = (merged or leases)[0].extras  # how the first that is named reads, so do all
        if use.is_single:
            only = next(lease for lease in leases if lease.ref.revision == use.parts[0].ref.revision)
            self.invocation_tokens = only.invocation_tokens
        self._leases = tuple(leases)

    def release(self) -> None:
        """On the event loop. Idempotent."""
        leases, self._leases = self._leases, ()
        for lease in leases:
            lease.release()


async def hold_one(registry: Registry, name: str, wish: AdapterWish) -> LeaseSet:
    """Raises ServeError."""
    [lease] = await _acquire_all(registry, [PartWish(name, 1.0, "model")], wish)
    return LeaseSet(AdapterUse.of(lease.ref), [lease], source=lease.info.source)


async def hold_set(registry: Registry, parts: Sequence[PartWish], wish: AdapterWish) -> LeaseSet | None:
    """Several adapters, each with its scale. None: nothing is left of them but the base model.

    Raises ServeError.
    """
    parts = [part for part in parts if part.scale]
    leases = await _acquire_all(registry, parts, wish)
    try:
        scaled = (AdapterPart(lease.ref, part.scale) for lease, part in zip(leases, parts, strict=True))
        left = tuple(part for part in AdapterUse.sum_of(scaled).parts if part.scale)
        use = AdapterUse(left) if left else None
        if use is not None and not use.is_single:
            for lease, part in zip(leases, parts, strict=True):
                kinds = frozenset(lease.info.kinds) & _NOT_SUMMED
                _refuse_kinds(lease, kinds, part.param, "summed or scaled")
    except BaseException:
        _release(leases)
        raise
    if use is None:
        _release(leases)
        return None
    return LeaseSet(use, leases, source=_source(leases))


async def hold_merged(registry: Registry, merge: Merge, merged: MergeWish, wish: AdapterWish) -> LeaseSet:
    """Adapters merged into one. Raises ServeError."""
    parts = [PartWish(name, 1.0, f"{merged.param}.ids[{i}]") for i, name in enumerate(merged.names)]
    leases = await _acquire_all(registry, parts, wish)
    try:
        for lease, part in zip(leases, parts, strict=True):
            _refuse_kinds(lease, frozenset(lease.info.kinds) - _PLAIN, part.param, "merged")
        order = merged.recipe.in_order([lease.ref.revision for lease in leases])
        recipe, chosen = merged.recipe.for_positions(order), [leases[i] for i in order]
        key = recipe.key([lease.ref.revision for lease in chosen])
        build = partial(merge, recipe, [lease.ref.name for lease in chosen])
        try:
            derived = await registry.derive(key, chosen, build)
        except AdapterError as error:
            raise refusal_of(error, merged.param) from error
        name = merged.recipe.name_for([lease.ref.name for lease in leases])
        use = AdapterUse.of(AdapterRef(name, derived.ref.revision))
        return LeaseSet(use, [derived], source=_source(leases), merged=leases)
    finally:
        _release(leases)


async def _acquire_all(registry: Registry, parts: Sequence[PartWish], wish: AdapterWish) -> list[Lease]:
    """A lease for each, in order; they are waited for side by side. Raises ServeError; then none is held."""
    leases: dict[int, Lease] = {}

    async def acquire(number: int, part: PartWish) -> None:
        token = None if wish.token is None else wish.token.reveal()
        try:
            leases[number] = await registry.acquire(part.name, source=wish.source, token=token)
        except AdapterError as error:
            raise refusal_of(error, part.param) from error

    try:
        if len(parts) == 1:
            await acquire(0, parts[0])
        else:
            async with asyncio.TaskGroup() as group:
                for number, part in enumerate(parts):
                    group.create_task(acquire(number, part))
    except BaseExceptionGroup as failures:
        _release(leases.values())
        raise failures.exceptions[0] from None
    except BaseException:
        _release(leases.values())
        raise
    return [leases[number] for number in range(len(parts))]


def _refuse_kinds(lease: Lease, kinds: frozenset[str], param: str, what: str) -> None:
    if kinds:
        raise BadRequest(
            f"adapter {shown(lease.ref.name)} has {', '.join(sorted(kinds))} and cannot be {what}",
            param=param,
        )


def _source(leases: Sequence[Lease]) -> str:
    """Where they come from, each place once."""
    return ",".join(sorted({lease.info.source for lease in leases}))


def _release(leases: Iterable[Lease]) -> None:
    for lease in leases:
        lease.release()
