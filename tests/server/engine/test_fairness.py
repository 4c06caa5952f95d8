"""What tenants get when they compete: simulations of thousands of steps, counted apart from the scheduler.

`Town` keeps tenants supplied with work and counts the service of each from what the runner was told and what
came out of it: prompt positions that are computed for the first time, and tokens.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

import pytest

from adapters.types import AdapterRef
from server.engine.fair_queue import Prices
from server.engine.sequence import SequenceId, SequenceStatus
from tests.fakes import Rig, adapter, make_rig

Dice = Callable[[], int]


@dataclass(slots=True)
class Tenant:
    """Somebody who sends requests."""

    name: str
    prompt: Dice  # lengths
    output: Dice
    weight: float = 1.0
    adapter: AdapterRef | None = None
    backlog: int = 0  # how many are always kept waiting
    sent: list[SequenceId] = field(default_factory=list)


class Town:
    def __init__(self, rig: Rig, tenants: list[Tenant], prices: Prices, *, is_fair: bool = True) -> None:
        self.rig = rig
        self.tenants = tenants
        self.prices = prices
        self.is_fair = is_fair
        self.service: defaultdict[str, float] = defaultdict(float)  # by weight
        self._owner: dict[SequenceId, Tenant] = {}
        self._seen: defaultdict[SequenceId, int] = defaultdict(int)  # first positions that were computed

    def send(self, tenant: Tenant) -> SequenceId:
        number = len(self._owner)
        sequence_id = self.rig.add(
            [(number * 7 + i * i) % 97 for i in range(tenant.prompt())],
            adapter=tenant.adapter,
            max_tokens=tenant.output(),
            tenant=tenant.name if self.is_fair else "",
            weight=tenant.weight if self.is_fair else 1.0,
        )
        self._owner[sequence_id] = tenant
        tenant.sent.append(sequence_id)
        return sequence_id

    def num_waiting(self, tenant: Tenant) -> int:
        tenant.sent = [one for one in tenant.sent if self.rig.finish(one) is None]
        sequences = [self.rig.sequence(one) for one in tenant.sent]
        return sum(sequence.status is SequenceStatus.WAITING for sequence in sequences)

    def step(self) -> None:
        for tenant in self.tenants:
            for _ in range(tenant.backlog - self.num_waiting(tenant)):
                self.send(tenant)
        num_steps = len(self.rig.runner.log)
        output = self.rig.step()
        for chunks in self.rig.runner.log[num_steps:]:
            for sequence_id, (start, num_tokens) in chunks.items():
                num_prompt = len(self.rig.added[sequence_id].prompt_ids)
                stop = min(start + num_tokens, num_prompt)
                first = max(start, self._seen[sequence_id])
                self._serve(sequence_id, self.prices.prefill * max(0, stop - first))
                self._seen[sequence_id] = max(stop, self._seen[sequence_id])
        for news in () if output is None else output.outputs:
            if news.token is not None:
                self._serve(news.id, self.prices.decode)

    def _serve(self, sequence_id: SequenceId, cost: float) -> None:
        tenant = self._owner[sequence_id]
        self.service[tenant.name] += cost / tenant.weight


def dice(random: Random, low: int, high: int) -> Dice:
    return lambda: random.randint(low, high)


def fixed(value: int) -> Dice:
    return lambda: value


# -- two tenants with work -----------------------------------------------------------------------------


def rival_town(seed: int, *, is_fair: bool = True) -> tuple[Town, float]:
    """Tenants that always have work and differ in everything, some that come and go; and the bound."""
    random = Random(seed)
    longest, num_tokens = 40, 160
    prices = Prices(random.choice([0.5, 1.0, 2.0]), random.choice([1.0, 2.0, 4.0]))
    block_size = random.choice([1, 4, 8])
    rig = make_rig(
        num_blocks=num_tokens // block_size,
        block_size=block_size,
        enable_prefix_caching=False,
        max_num_seqs=random.choice([2, 5, 12]),
        max_num_batched_tokens=random.choice([8, 30, 100]),
        prices=prices,
        crowd_tokens=random.choice([None, 4, 16]),
    )
    tenants = [
        Tenant(
            f"rival {number}",
            dice(random, 1, random.choice([3, longest])),
            dice(random, 1, random.choice([3, 40])),
            weight=random.choice([0.5, 1.0, 3.0]) if is_fair else 1.0,
            backlog=random.choice([15, 40]),  # more than there are seats: some always wait
        )
        for number in range(random.choice([2, 3, 5]))
    ]
    least = min(tenant.weight for tenant in tenants)
    bound = 2 * max(prices.prefill * longest, prices.decode * num_tokens) / least
    return Town(rig, tenants, prices, is_fair=is_fair), bound


def widest_gap(town: Town, num_steps: int, guest_of: Random) -> float:
    """The most by which one rival got ahead of another, over any stretch of time."""
    guests = [Tenant(f"guest {number}", fixed(9), fixed(9)) for number in range(3)]
    history: list[dict[str, float]] = []
    for _ in range(num_steps):
        for guest in guests:
            if guest_of.random() < 0.05:
                town.send(guest)
        town.step()
        history.append(dict(town.service))
    gaps = []
    for one, other in combinations([tenant.name for tenant in town.tenants], 2):
        ahead = [served.get(one, 0.0) - served.get(other, 0.0) for served in history]
        gaps.append(max(ahead) - min(ahead))
    return max(gaps)


@pytest.mark.parametrize("seed", range(8))
def test_of_two_tenants_with_work_none_gets_further_ahead_than_the_papers_bound(seed: int) -> None:
    town, bound = rival_town(seed)
    assert widest_gap(town, 800, Random(seed)) <= bound
    assert sum(town.service.values()) > bound  # there was enough to share


def test_without_fair_shares_the_same_tenants_get_further_apart() -> None:
    """Else the bound would say nothing."""
    gaps = []
    for seed in range(4):
        town, bound = rival_town(seed, is_fair=False)
        gaps.append(widest_gap(town, 800, Random(seed)) / bound)
    assert max(gaps) > 1.5


def test_who_comes_back_from_idle_shares_from_then_on_and_catches_up_nothing() -> None:
    rig = make_rig(num_blocks=100, max_num_seqs=4)
    busy, idle = Tenant("busy", fixed(5), fixed(10), backlog=5), Tenant("idle", fixed(5), fixed(10))
    town = Town(rig, [busy, idle], Prices())
    for _ in range(500):
        town.step()
    before = dict(town.service)
    idle.backlog = 5
    for _ in range(200):
        town.step()
    gained = [town.service[one.name] - before.get(one.name, 0.0) for one in (busy, idle)]
    assert abs(gained[0] - gained[1]) <= 2 * 4 * (5 + 2 * 10)
    assert min(gained) > 500


def test_what_one_leaves_the_others_get() -> None:
    """Nobody waits while there is room: when somebody does, seats or budget are used up."""
    random = Random(5)
    rig = make_rig(num_blocks=200, max_num_seqs=6, max_num_batched_tokens=30, arena_bytes=60)
    tenants = [
        Tenant(f"tenant {i}", dice(random, 1, 50), dice(random, 1, 12), adapter=adapter(f"adapter-{i}"))
        for i in range(5)
    ]
    town, num_full = Town(rig, tenants, Prices()), 0
    for _ in range(800):
        for tenant in tenants:
            if random.random() < 0.12:
                town.send(tenant)
        town.step()
        if rig.last is not None and rig.last.stats.waiting:
            stats = rig.last.stats
            num_ended = sum(news.finish is not None for news in rig.last.outputs)
            assert stats.running + num_ended == 6 or stats.prefill_tokens + stats.decode_tokens == 30
            num_full += 1
    assert num_full > 100


def test_the_same_arrivals_give_the_same_steps() -> None:
    def log() -> Any:
        town, _ = rival_town(3)
        widest_gap(town, 200, Random(1))
        return town.rig.runner.log

    assert log() == log()


# -- floods --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_seats", "most_steps"), [(256, 2), (16, 12)])
def test_a_flood_delays_another_tenants_requests_by_a_few_steps(num_seats: int, most_steps: int) -> None:
    """Where seats are short, until one of those that are taken is free: none is taken for more than 40 steps,
    and of 16 one is free much sooner.
    """
    rig = make_rig(
        num_blocks=6000, max_num_seqs=num_seats, max_num_batched_tokens=512, enable_prefix_caching=False
    )
    flood = Tenant("flood", dice(Random(1), 1, 60), dice(Random(2), 1, 40), adapter=adapter("flood"))
    other = Tenant("other", fixed(30), fixed(3), adapter=adapter("other"))
    town = Town(rig, [flood, other], Prices())
    for _ in range(200):
        town.send(flood)
    waits = []
    for _ in range(20):
        if num_seats < 200:
            town.send(flood)  # it does not stop
        one = town.send(other)
        steps = 0
        while not rig.tokens(one):
            town.step()
            steps += 1
        waits.append(steps)
        for _ in range(5):
            town.step()
    assert max(waits) <= most_steps


def test_in_company_a_crowd_keeps_its_steps_short_and_a_guests_prompt_has_one_of_its_own() -> None:
    rig = make_rig(num_blocks=6000, max_num_seqs=256, max_num_batched_tokens=512, crowd_tokens=20)
    crowd = [rig.add([i % 90 + 1] * 12, tenant="crowd", max_tokens=30) for i in range(100)]
    guest = rig.add([3] * 30, tenant="guest", max_tokens=4)
    for _ in range(60):
        rig.step()
        chunks = rig.runner.log[-1]
        of_crowd = {one: num_tokens for one, (_, num_tokens) in chunks.items() if one != guest}
        assert sum(of_crowd.values()) <= 20
        if chunks.get(guest, (0, 0))[1] > 1:
            assert not any(rig.tokens(one)[:-1] for one in of_crowd), "tokens of others beside its prompt"
    assert len(rig.tokens(guest)) == 4
    rig.run()
    assert all(rig.tokens(one) == rig.expected(one) for one in crowd)


def test_many_guests_at_once_do_not_keep_a_stream_from_its_tokens() -> None:
    rig = make_rig(num_blocks=6000, max_num_seqs=256, max_num_batched_tokens=64, crowd_tokens=20)
    stream = rig.add([1, 2, 3], tenant="stream", max_tokens=1000)
    rig.step()
    guests = [rig.add([i + 1] * 60, tenant=f"guest {i}", max_tokens=1) for i in range(20)]
    waits, waited = [], 0
    while not all(rig.finish(one) for one in guests):
        rig.step()
        waited = 0 if stream in rig.runner.log[-1] else waited + 1
        waits.append(waited)
    assert max(waits) == 1, "a guest has a step of its own, but no two in a row"


def test_a_tenant_alone_has_no_bound_and_is_not_sure_to_be_alone_for_some_seconds() -> None:
    rig = make_rig(num_blocks=6000, max_num_seqs=256, max_num_batched_tokens=512, crowd_tokens=20)
    for i in range(50):
        rig.add([i + 1] * 4, tenant="crowd", max_tokens=1000)
    rig.step()
    assert sum(n for _, n in rig.runner.log[-1].values()) == 200
    guest = rig.add([3], tenant="guest", max_tokens=1)
    rig.step()
    assert rig.finish(guest) is not None
    seen: list[SequenceId] = []
    for _ in range(10):
        rig.step()
        assert sum(n for _, n in rig.runner.log[-1].values()) == 20
        seen += rig.runner.log[-1]
    assert {seen.count(one) for one in rig.added if one != guest} <= {3, 4, 5}, "all take turns"
    rig.clock.advance(10.0)
    rig.step()
    assert sum(n for _, n in rig.runner.log[-1].values()) == 50


def test_a_guest_that_cannot_come_in_holds_nobody_up() -> None:
    rig = make_rig(num_blocks=100, crowd_tokens=8, arena_bytes=10, adapter_stay_s=1000.0)
    one = rig.add([1] * 5, tenant="host", adapter=adapter("ant"), max_tokens=40)
    rig.step()
    rig.step()
    guest = rig.add([2] * 5, tenant="guest", adapter=adapter("bee"), max_tokens=2)
    for _ in range(10):
        before = len(rig.tokens(one))
        rig.step()
        assert len(rig.tokens(one)) == before + 1
    rig.run()
    assert rig.tokens(guest) == rig.expected(guest)


def test_a_short_prompt_does_not_wait_for_another_tenants_long_one() -> None:
    rig = make_rig(num_blocks=1000, max_num_batched_tokens=10, enable_prefix_caching=False)
    for _ in range(3):
        rig.add([1] * 300, tenant="long")
    rig.step()
    short = rig.add([2] * 8, tenant="short")
    rig.step()  # equal by now, and then who runs comes first
    rig.step()
    assert rig.runner.log[-1] == {short: (0, 8), 1: (20, 2)}
    assert len(rig.tokens(short)) == 1


def test_when_blocks_are_short_the_tenant_that_was_served_most_gives_way() -> None:
    rig = make_rig(num_blocks=30, block_size=2, enable_prefix_caching=False)
    flood = [rig.add([i + 1] * 4, tenant="flood", max_tokens=30) for i in range(5)]
    for _ in range(3):
        rig.step()
    single = rig.add([9] * 4, tenant="single", max_tokens=15)
    preemptions = 0
    while rig.finish(single) is None:
        output = rig.step()
        assert output is not None
        preemptions += output.stats.preemptions
        if rig.finish(single) is None:
            assert rig.sequence(single).status is SequenceStatus.RUNNING
    assert preemptions > 0
    rig.run()
    for one in (*flood, single):
        assert rig.tokens(one) == rig.expected(one)
    rig.assert_all_free()


def test_a_large_sequence_is_not_starved_by_the_small_ones_of_other_tenants() -> None:
    rig = make_rig(num_blocks=20, block_size=4, max_num_seqs=8, enable_prefix_caching=False)
    town = Town(
        rig,
        [Tenant(f"small {i}", fixed(3), dice(Random(i), 1, 12), backlog=5) for i in range(3)],
        Prices(),
    )
    for _ in range(100):
        town.step()
    large = town.send(Tenant("large", fixed(60), fixed(2)))
    steps = 0
    while rig.finish(large) is None:
        town.step()
        steps += 1
    assert steps < 60


def test_a_reader_that_does_not_read_pays_for_what_is_computed_again() -> None:
    rig = make_rig(num_blocks=4, block_size=4, enable_prefix_caching=False)
    sleeper = rig.add([1] * 7, tenant="sleeper")
    rig.step()
    rig.pause(sleeper)
    rig.add([2] * 14, tenant="other", max_tokens=1)  # takes the sleeper's blocks
    rig.run()
    before = rig.scheduler._queue.served(rig.sequence(sleeper))
    rig.resume(sleeper)
    rig.step()
    assert rig.scheduler._queue.served(rig.sequence(sleeper)) >= before + 8


# -- more adapters than fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("prefetches", [False, True])
@pytest.mark.parametrize("num_resident", [1, 2, 3])
def test_floods_on_more_adapters_than_fit_get_the_same_service(num_resident: int, prefetches: bool) -> None:
    """Who waits for room waits at most until each other one had its stay, and its longest sequence after
    that; meanwhile the others get all there is.
    """
    random = Random(num_resident)
    num_tenants, num_seats, stay_steps, longest = 6, 6, 10, 20
    rig = make_rig(
        num_blocks=100,
        max_num_seqs=num_seats,
        arena_bytes=10 * num_resident,
        adapter_stay_s=0.1,
        prefetches=prefetches,
        enable_prefix_caching=False,
    )
    tenants = [
        Tenant(f"t{i}", dice(random, 1, 10), dice(random, 1, longest), adapter=adapter(f"a{i}"), backlog=4)
        for i in range(num_tenants)
    ]
    town = Town(rig, tenants, Prices())
    history = []
    for _ in range(1000):
        town.step()
        history.append(dict(town.service))
    round_steps = num_tenants * (stay_steps + longest)
    most_per_step = num_seats * (2.0 + 10)
    for one, other in combinations([tenant.name for tenant in tenants], 2):
        ahead = [served.get(one, 0.0) - served.get(other, 0.0) for served in history]
        assert max(ahead) - min(ahead) <= 2 * round_steps * most_per_step
    assert min(town.service.values()) > 0.7 * max(town.service.values())


def test_a_single_request_gets_room_although_floods_hold_all_of_it() -> None:
    rig = make_rig(
        num_blocks=100, max_num_seqs=8, arena_bytes=20, adapter_stay_s=0.1, enable_prefix_caching=False
    )
    floods = [
        Tenant(f"flood {i}", fixed(5), dice(Random(i), 1, 20), adapter=adapter(f"f{i}"), backlog=20)
        for i in range(2)
    ]
    town = Town(rig, floods, Prices())
    single = Tenant("single", fixed(5), fixed(3), adapter=adapter("single"))
    for _ in range(10):
        for _ in range(50):
            town.step()
        one, steps = town.send(single), 0
        while rig.finish(one) is None:
            town.step()
            steps += 1
        assert steps <= 10 + 20 + 20 + 3  # the rest of a stay, the longest in there, a seat, and itself
