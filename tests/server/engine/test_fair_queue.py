"""Turns and counters, without anything that computes."""

from typing import Any

import pytest

from adapters.types import AdapterUse
from server.engine.fair_queue import FairQueue, Prices
from server.engine.sequence import Sequence, SequenceId, WaitReason
from server.types import SamplingParams, StopCriteria
from tests.fakes import adapter

ANT, BEE = (AdapterUse.of(adapter(name)) for name in ("ant", "bee"))


class Desk:
    """A queue, and sequences that come to it one after the other."""

    def __init__(self, **prices: float) -> None:
        self.queue = FairQueue(Prices(**prices))
        self.living: list[Sequence] = []

    def come(self, tenant: str, num_prompt: int = 10, **fields: Any) -> Sequence:
        number = len(self.living) + 1
        values: dict[str, Any] = {"adapter": None, "stop": StopCriteria(max_tokens=8), **fields}
        sequence = Sequence(
            id=SequenceId(number),
            tokens=[1] * num_prompt,
            num_prompt=num_prompt,
            sampling=SamplingParams(),
            seed=0,
            arrival=float(number),
            tenant=tenant,
            **values,
        )
        self.living.append(sequence)
        self.queue.open(sequence)
        self.queue.add(sequence)
        return sequence

    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        """Some more positions, and a token if that is all of them."""
        self.queue.charge(sequence, sequence.num_computed, num_tokens)
        sequence.num_computed += num_tokens
        if sequence.num_computed == sequence.num_tokens:
            sequence.tokens.append(1)

    def go(self, sequence: Sequence) -> None:
        """It is over."""
        self.living.remove(sequence)
        self.queue.close(sequence)

    def turns(self, running: list[Sequence] | None = None, num_tokens: int = 10) -> list[SequenceId]:
        """Everybody gets in, and computes so much."""
        order = []
        for sequence in self.queue.turns(running or [], may_enter=True):
            order.append(sequence.id)
            if sequence in list(self.queue):
                self.queue.remove(sequence)
            self.compute(sequence, num_tokens)
        self.queue.check(self.living)
        return order


# -- order ---------------------------------------------------------------------------------------------


def test_a_single_tenant_is_served_in_order_of_arrival_whatever_its_adapters() -> None:
    desk = Desk()
    for use in (ANT, None, BEE, ANT, BEE, None):
        desk.come("only", adapter=use)
    assert desk.turns() == [1, 2, 3, 4, 5, 6]


def test_tenants_take_turns_however_many_sequences_each_has() -> None:
    desk = Desk()
    for tenant in "aaaaabb":
        desk.come(tenant)
    assert desk.turns() == [1, 6, 2, 7, 3, 4, 5]


def test_who_runs_comes_before_who_waits_of_the_same_tenant_and_after_tenants_that_were_served_less() -> None:
    desk = Desk()
    running = desk.come("a", 100)
    desk.queue.remove(running)
    desk.compute(running, 10)
    desk.come("a")
    desk.come("b")
    desk.queue._accounts["b"].served = 0.0  # as if it had waited since before
    assert desk.turns([running]) == [3, 1, 2]


def test_a_head_that_stays_keeps_its_line_but_nobody_else() -> None:
    desk = Desk()
    stuck = desk.come("a", adapter=ANT)
    for tenant, use in (("a", ANT), ("a", BEE), ("b", ANT)):
        desk.come(tenant, adapter=use)
    desk.queue.begin_turns()
    order = []
    for sequence in desk.queue.turns([], may_enter=True):
        order.append(sequence.id)
        if sequence is stuck:
            desk.queue.skip(sequence, WaitReason.ADAPTER)
        else:
            desk.queue.remove(sequence)
    desk.queue.end_turns(WaitReason.CAPACITY)
    assert order == [1, 3, 4]
    assert desk.queue.counts() == ((WaitReason.ADAPTER, 2),)


def test_who_had_no_turn_waits_for_the_same_as_the_one_that_held_it_up() -> None:
    desk = Desk()
    for tenant in "abb":
        desk.come(tenant)
    desk.queue.begin_turns()
    next(desk.queue.turns([], may_enter=True))
    desk.queue.end_turns(WaitReason.BLOCKS)
    assert desk.queue.counts() == ((WaitReason.BLOCKS, 3),)


def test_a_weight_of_two_gets_two_turns_for_one() -> None:
    desk = Desk()
    for _ in range(6):
        desk.come("heavy", weight=2.0, stop=StopCriteria(max_tokens=0))
        desk.come("light", stop=StopCriteria(max_tokens=0))
    tenants = ["heavy" if number % 2 else "light" for number in desk.turns()]
    assert tenants[:9].count("heavy") == 6
    assert tenants[:9].count("light") == 3


# -- what is charged -----------------------------------------------------------------------------------


def test_tokens_that_are_there_and_tokens_that_are_drawn_have_their_prices() -> None:
    desk = Desk(prefill=3.0, decode=5.0)
    one = desk.come("a", 10)
    desk.compute(one, 7)
    assert desk.queue.served(one) == 21.0
    desk.compute(one, 3)
    assert desk.queue.served(one) == 30.0 + 5.0
    desk.compute(one, 1)
    desk.compute(one, 1)
    assert desk.queue.served(one) == 30.0 + 3 * 5.0


def test_what_the_prefix_cache_had_is_not_charged() -> None:
    desk = Desk()
    one = desk.come("a", 10, stop=StopCriteria(max_tokens=0))
    one.num_computed = 8
    desk.compute(one, 2)
    assert desk.queue.served(one) == 2.0


def test_what_is_computed_again_is_not_charged_again() -> None:
    desk = Desk()
    one = desk.come("a", 10)
    for num_tokens in (10, 1, 1):
        desk.compute(one, num_tokens)
    before = desk.queue.served(one)
    one.num_computed = 0
    desk.compute(one, 9)
    assert desk.queue.served(one) == before
    desk.compute(one, one.num_tokens - 9)
    assert desk.queue.served(one) == before + 2.0  # for the token that is new


# -- idle tenants --------------------------------------------------------------------------------------


def test_who_comes_back_from_idle_is_lifted_to_the_least_served_of_those_who_wait() -> None:
    desk = Desk()
    first, second = desk.come("a"), desk.come("b")
    desk.compute(first, 10)
    desk.compute(second, 4)
    late = desk.come("c")
    assert desk.queue.served(late) == desk.queue.served(second) == 4.0


def test_with_nobody_waiting_the_one_who_waited_last_is_the_measure() -> None:
    desk = Desk()
    first = desk.come("a")
    desk.queue.remove(first)
    desk.compute(first, 10)
    late = desk.come("b")
    assert desk.queue.served(late) == desk.queue.served(first) == 12.0


def test_going_away_and_coming_back_pays_no_debt() -> None:
    desk = Desk()
    other = desk.come("b")
    greedy = desk.come("a", 1000)
    desk.queue.remove(greedy)
    desk.compute(greedy, 900)
    desk.go(greedy)
    desk.compute(other, 3)
    assert desk.queue.served(desk.come("a")) == 900.0
    assert desk.queue.served(other) == 3.0


def test_thousands_of_tenants_that_come_once_are_forgotten() -> None:
    desk = Desk()
    most = 0
    for number in range(5000):
        one = desk.come(f"tenant {number}")
        desk.queue.remove(one)
        desk.compute(one, 10)
        desk.go(one)
        most = max(most, len(desk.queue._accounts))
    assert most < 200
    desk.queue.check(desk.living)


def test_of_too_many_tenants_in_debt_those_are_remembered_that_owe_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.engine.fair_queue._MAX_REMEMBERED", 10)
    desk = Desk()
    waiting = desk.come("patient")
    for number in range(200):
        one = desk.come(f"tenant {number}", 500)
        desk.queue.remove(one)
        desk.compute(one, 100 + number)
        desk.go(one)
    assert len(desk.queue._accounts) < 100
    assert desk.queue.served(desk.come("tenant 199")) == 299.0
    assert desk.queue.served(desk.come("tenant 0")) == desk.queue.served(waiting)
