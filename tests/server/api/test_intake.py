"""Turns at being taken in: nobody waits alone, a burst waits for others, who leaves is forgotten."""

import asyncio

from server.api.intake import PER_ROUND, Intake


async def _take(intake: Intake, tenant: str, order: list[str]) -> None:
    await intake.turn(tenant)
    order.append(tenant)


async def test_who_comes_while_nobody_waits_does_not_wait() -> None:
    intake = Intake()
    turn = intake.turn("a")
    try:
        turn.send(None)
    except StopIteration:
        return
    raise AssertionError("it waited")


async def test_a_few_have_their_turn_and_then_the_loop_is_free() -> None:
    intake, order = Intake(), list[str]()
    burst = [asyncio.create_task(_take(intake, "a", order)) for _ in range(3 * PER_ROUND)]
    await asyncio.sleep(0)
    assert len(order) == PER_ROUND
    await asyncio.gather(*burst)
    assert len(order) == 3 * PER_ROUND


async def test_tenants_take_turns_however_long_anybodys_line_is() -> None:
    intake, order = Intake(), list[str]()
    burst = [asyncio.create_task(_take(intake, "flood", order)) for _ in range(50)]
    await asyncio.sleep(0)
    late = [asyncio.create_task(_take(intake, tenant, order)) for tenant in ("b", "c")]
    await asyncio.gather(*late)
    assert len(order) <= 2 * PER_ROUND
    await asyncio.gather(*burst)
    assert sorted(order) == ["b", "c", *["flood"] * 50]


async def test_who_has_left_takes_no_turn() -> None:
    intake, order = Intake(), list[str]()
    burst = [asyncio.create_task(_take(intake, "a", order)) for _ in range(4 * PER_ROUND)]
    await asyncio.sleep(0)
    for task in burst[PER_ROUND : 3 * PER_ROUND]:
        task.cancel()
    last = asyncio.create_task(_take(intake, "a", order))
    await last
    assert len(order) == 2 * PER_ROUND + 1
    await asyncio.gather(*burst, return_exceptions=True)
