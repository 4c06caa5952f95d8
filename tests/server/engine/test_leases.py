"""One lease over several adapters: whatever happens on the way to it and after it, nothing stays held."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from adapters.errors import AdapterError, AdapterIncompatible, AdapterNotFound, AdapterUnavailable
from adapters.recipes import MergeMethod, MergeRecipe
from adapters.types import AdapterInfo, AdapterPart, AdapterRef, AdapterUse, Revision
from server.engine.leases import LeaseSet, hold_merged, hold_one, hold_set
from server.errors import BadRequest, ModelNotFound, ServeError, Unavailable
from server.wishes import NO_WISH, AdapterWish, MergeWish, PartWish, Secret


class ScriptedLease:
    def __init__(self, info: AdapterInfo, invocation_tokens: tuple[int, ...] = ()) -> None:
        self.info = info
        self.invocation_tokens = invocation_tokens
        self.extras: object | None = f"extras of {info.ref.name}"
        self.releases = 0

    @property
    def ref(self) -> AdapterRef:
        return self.info.ref

    def release(self) -> None:
        self.releases += 1


class ScriptedRegistry:
    """Every name is an adapter's, but those with an error; `late` ones come when the test lets them."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[str, ...]] = {}
        self.revisions: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}
        self.invocations: dict[str, tuple[int, ...]] = {}
        self.late: dict[str, asyncio.Event] = {}
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.waiting: asyncio.Queue[str] = asyncio.Queue()  # late ones that somebody waits for
        self.leases: list[ScriptedLease] = []
        self.derived: list[tuple[str, list[str]]] = []
        self.deriving = asyncio.Event()  # somebody asks
        self.may_derive = asyncio.Event()
        self.may_derive.set()
        self.derive_error: AdapterError | None = None
        self.built: Any = None

    async def acquire(
        self, name: str, *, source: str | None = None, token: str | None = None
    ) -> ScriptedLease:
        self.asked.append((name, source, token))
        if name in self.late:
            self.waiting.put_nowait(name)
            await self.late[name].wait()
        if name in self.errors:
            raise self.errors[name]
        return self._lease(name, Revision(self.revisions.get(name, f"r-{name}")), self.kinds.get(name, ()))

    async def derive(
        self, key: str, leases: Sequence[ScriptedLease], build: Callable[[Sequence[Any]], Any]
    ) -> ScriptedLease:
        assert all(lease.releases == 0 for lease in leases), "the ingredients are held"
        self.derived.append((key, [lease.ref.name for lease in leases]))
        self.deriving.set()
        await self.may_derive.wait()
        if self.derive_error is not None:
            raise self.derive_error
        self.built = build([f"weights of {lease.ref.name}" for lease in leases])
        return self._lease(key, Revision(key), ("merged",))

    def _lease(self, name: str, revision: Revision, kinds: tuple[str, ...]) -> ScriptedLease:
        source = self.sources.get(name, "local")
        info = AdapterInfo(AdapterRef(name, revision), "", source, 8, (), 1, 0, kinds)
        lease = ScriptedLease(info, self.invocations.get(name, ()))
        self.leases.append(lease)
        return lease

    @property
    def held(self) -> list[str]:
        assert all(lease.releases <= 1 for lease in self.leases), "given back twice"
        return [lease.ref.name for lease in self.leases if not lease.releases]


@pytest.fixture
def registry() -> ScriptedRegistry:
    return ScriptedRegistry()


def parts(**scales: float) -> list[PartWish]:
    return [PartWish(name, scale, f"lora[{i}].name") for i, (name, scale) in enumerate(scales.items())]


def merge_of(*names: str, recipe: MergeRecipe | None = None) -> MergeWish:
    return MergeWish(names, recipe or MergeRecipe((1.0,) * len(names)))


def merge(recipe: MergeRecipe, names: Sequence[str], adapters: Sequence[Any]) -> tuple[Any, ...]:
    return recipe, list(names), list(adapters)


async def refusal(holding: Any) -> ServeError:
    with pytest.raises(ServeError) as refused:
        await holding
    return refused.value


# --- one --------------------------------------------------------------------------------------------------


async def test_one_adapter_is_held_with_all_that_belongs_to_it(registry: ScriptedRegistry) -> None:
    registry.invocations["ant"], registry.sources["ant"] = (5, 6), "hub"
    lease = await hold_one(registry, "ant", AdapterWish("hub", Secret("t")))

    assert registry.asked == [("ant", "hub", "t")]
    assert lease.use == AdapterUse.of(AdapterRef("ant", Revision("r-ant")))
    assert (lease.source, lease.invocation_tokens, lease.extras) == ("hub", (5, 6), "extras of ant")
    assert registry.held == ["ant"]
    lease.release()
    lease.release()
    assert registry.held == []


# --- sets -------------------------------------------------------------------------------------------------


async def held_set(registry: ScriptedRegistry, **scales: float) -> LeaseSet:
    lease = await hold_set(registry, parts(**scales), NO_WISH)
    assert lease is not None
    return lease


async def test_set_holds_all_of_its_adapters_until_it_is_released(registry: ScriptedRegistry) -> None:
    registry.sources["bee"] = "hub"
    lease = await held_set(registry, cat=2.0, ant=0.5, bee=-1.0)

    assert lease.use.name == "ant:0.5+bee:-1+cat:2"
    assert (lease.source, lease.invocation_tokens) == ("hub,local", ())
    assert lease.extras == "extras of cat", "the text of the one that is named first"
    assert sorted(registry.held) == ["ant", "bee", "cat"]
    lease.release()
    lease.release()
    assert registry.held == []


async def test_adapters_of_a_set_are_waited_for_side_by_side(registry: ScriptedRegistry) -> None:
    registry.late = {name: asyncio.Event() for name in ("ant", "bee", "cat")}
    holding = asyncio.create_task(held_set(registry, ant=1, bee=1, cat=1))
    asked = {await asyncio.wait_for(registry.waiting.get(), 10) for _ in range(3)}
    assert asked == {"ant", "bee", "cat"}
    for name in ("cat", "ant", "bee"):
        registry.late[name].set()
    lease = await holding

    assert {part.ref.name for part in lease.use.parts} == {"ant", "bee", "cat"}


@pytest.mark.parametrize("failing", ["ant", "cat", "elk"])
@pytest.mark.parametrize("late", [(), ("ant", "dog"), ("bee", "cat", "elk")])
async def test_when_one_of_five_fails_nothing_is_held(
    registry: ScriptedRegistry, failing: str, late: tuple[str, ...]
) -> None:
    """Nobody waits for those that are late, either, unless it is the one that fails."""
    registry.errors[failing] = AdapterNotFound("there is no such adapter")
    registry.late = {name: asyncio.Event() for name in late if name != failing}
    holding = hold_set(registry, parts(ant=1, bee=1, cat=1, dog=1, elk=1), NO_WISH)
    refused = await asyncio.wait_for(refusal(holding), 10)

    assert isinstance(refused, ModelNotFound)
    assert refused.param == f"lora[{['ant', 'bee', 'cat', 'dog', 'elk'].index(failing)}].name"
    assert registry.held == []


async def test_a_client_that_leaves_while_it_waits_holds_nothing(registry: ScriptedRegistry) -> None:
    registry.late["cat"] = asyncio.Event()
    holding = asyncio.create_task(hold_set(registry, parts(ant=1, bee=1, cat=1), NO_WISH))
    await asyncio.wait_for(registry.waiting.get(), 10)
    assert registry.held == ["ant", "bee"]
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding

    assert registry.held == []


async def test_what_fails_in_an_unforeseen_way_is_not_swallowed(registry: ScriptedRegistry) -> None:
    registry.errors["bee"] = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        await hold_set(registry, parts(ant=1, bee=1), NO_WISH)

    assert registry.held == []


async def test_adapter_that_is_not_ready_says_when_to_come_back(registry: ScriptedRegistry) -> None:
    registry.errors["bee"] = AdapterUnavailable("later", retry_after_s=7)
    refused = await refusal(hold_set(registry, parts(ant=1, bee=1), NO_WISH))

    assert isinstance(refused, Unavailable)
    assert (refused.param, refused.retry_after_s) == ("lora[1].name", 7)


async def test_scales_of_two_names_of_one_revision_are_added(registry: ScriptedRegistry) -> None:
    registry.revisions = {"ant": "same", "alias": "same"}
    lease = await held_set(registry, ant=0.5, alias=0.25, bee=1.0)

    assert {(part.ref.revision, part.scale) for part in lease.use.parts} == {("same", 0.75), ("r-bee", 1.0)}
    assert sorted(registry.held) == ["alias", "ant", "bee"]


async def test_parts_without_effect_are_left_out_and_not_even_loaded(registry: ScriptedRegistry) -> None:
    lease = await held_set(registry, ant=0.0, bee=2.0)

    assert lease.use.parts == (AdapterPart(AdapterRef("bee", Revision("r-bee")), 2.0),)
    assert [name for name, *_ in registry.asked] == ["bee"]


async def test_set_that_adds_up_to_nothing_is_the_base_model(registry: ScriptedRegistry) -> None:
    registry.revisions = {"ant": "same", "alias": "same"}

    assert await hold_set(registry, parts(ant=0.5, alias=-0.5), NO_WISH) is None
    assert await hold_set(registry, [], NO_WISH) is None
    assert registry.held == []


@pytest.mark.parametrize("kind", ["dora", "alora", "token_rows"])
@pytest.mark.parametrize("others", [{}, {"ant": 1.0}])
async def test_adapter_that_is_no_sum_is_refused_by_its_kind(
    registry: ScriptedRegistry, kind: str, others: dict[str, float]
) -> None:
    registry.kinds["bee"] = ("embedding", kind, "rslora")
    refused = await refusal(hold_set(registry, parts(**others, bee=0.5), NO_WISH))

    assert isinstance(refused, BadRequest)
    assert refused.message == f"adapter 'bee' has {kind} and cannot be summed or scaled"
    assert refused.param == f"lora[{len(others)}].name"
    assert registry.held == []


async def test_adapter_of_any_kind_may_stand_alone_in_a_list(registry: ScriptedRegistry) -> None:
    registry.kinds["bee"], registry.invocations["bee"] = ("alora", "dora"), (5,)
    for scales in ({"bee": 1.0}, {"ant": 0.0, "bee": 1.0}):
        lease = await held_set(registry, **scales)
        assert lease.use == AdapterUse.of(AdapterRef("bee", Revision("r-bee")))
        assert (lease.invocation_tokens, lease.extras) == ((5,), "extras of bee")


async def test_adapter_in_two_halves_is_the_whole(registry: ScriptedRegistry) -> None:
    registry.revisions = {"ant": "same", "alias": "same"}
    registry.invocations = {"ant": (5,), "alias": (5,)}
    lease = await held_set(registry, ant=0.5, alias=0.5)

    assert lease.use.is_single
    assert lease.invocation_tokens == (5,)


@pytest.mark.parametrize("kind", ["rslora", "lora_bias", "embedding", "head"])
async def test_kinds_that_are_sums_may_be_in_a_set(registry: ScriptedRegistry, kind: str) -> None:
    registry.kinds["bee"] = (kind,)

    assert (await held_set(registry, ant=1.0, bee=0.5)).use.name == "ant:1+bee:0.5"


# --- merges -----------------------------------------------------------------------------------------------


async def test_merge_holds_the_merged_adapter_alone(registry: ScriptedRegistry) -> None:
    registry.revisions = {"ant": "r2", "bee": "r1"}
    recipe = MergeRecipe((0.5, 2.0), MergeMethod.TIES, 0.3)
    lease = await hold_merged(registry, merge, merge_of("ant", "bee", recipe=recipe), NO_WISH)

    key = recipe.key([Revision("r2"), Revision("r1")])
    assert registry.derived == [(key, ["bee", "ant"])], "in the order of the revisions"
    turned = MergeRecipe((2.0, 0.5), MergeMethod.TIES, 0.3)
    assert registry.built == (turned, ["bee", "ant"], ["weights of bee", "weights of ant"])
    assert lease.use == AdapterUse.of(AdapterRef("ties(ant:0.5+bee:2, density 0.3)", Revision(key)))
    assert lease.extras == "extras of ant", "the text of the one that is named first"
    assert lease.names == ("ant", "bee"), "who is charged, and whose limits hold"
    assert registry.held == [key]
    lease.release()
    assert registry.held == []


async def test_order_in_which_a_client_lists_them_does_not_make_another_merge(
    registry: ScriptedRegistry,
) -> None:
    for names in (("ant", "bee"), ("bee", "ant")):
        lease = await hold_merged(registry, merge, merge_of(*names), NO_WISH)
        assert lease.extras == f"extras of {names[0]}"

    assert registry.derived[0] == registry.derived[1]


@pytest.mark.parametrize("kind", ["dora", "alora", "lora_bias", "embedding", "head", "token_rows"])
async def test_only_plain_adapters_are_merged(registry: ScriptedRegistry, kind: str) -> None:
    registry.kinds = {"ant": ("rslora",), "bee": (kind, "rslora")}
    refused = await refusal(hold_merged(registry, merge, merge_of("ant", "bee"), NO_WISH))

    assert isinstance(refused, BadRequest)
    assert refused.message == f"adapter 'bee' has {kind} and cannot be merged"
    assert refused.param == "merged_adapters.ids[1]"
    assert registry.held == []


async def test_merge_that_is_not_possible_is_the_request_s_fault(registry: ScriptedRegistry) -> None:
    registry.derive_error = AdapterIncompatible("ranks differ")
    refused = await refusal(hold_merged(registry, merge, merge_of("ant", "bee"), NO_WISH))

    assert isinstance(refused, BadRequest)
    assert (refused.message, refused.param) == ("ranks differ", "merged_adapters")
    assert registry.held == []


async def test_unknown_adapter_of_a_merge_leaves_nothing_held(registry: ScriptedRegistry) -> None:
    registry.errors["bee"] = AdapterNotFound("there is no such adapter")
    refused = await refusal(hold_merged(registry, merge, merge_of("ant", "bee"), NO_WISH))

    assert refused.param == "merged_adapters.ids[1]"
    assert registry.held == []
    assert registry.derived == []


async def test_a_client_that_leaves_while_adapters_are_merged_holds_nothing(
    registry: ScriptedRegistry,
) -> None:
    registry.may_derive.clear()
    holding = asyncio.create_task(hold_merged(registry, merge, merge_of("ant", "bee"), NO_WISH))
    await asyncio.wait_for(registry.deriving.wait(), 10)
    assert sorted(registry.held) == ["ant", "bee"]
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding

    assert registry.held == []
