"""Hard limits: who is refused, until when, and that every end gives back what was counted."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.engine.stream import TokenStream
from server.engine.worker import EngineDied
from server.errors import Overloaded, RateLimited
from server.types import FinishReason, Quota, QuotaKind
from tests.server.engine.test_service import Stage, end, read, token

PROMPT = ((5, 6, 7),)


def adapter_quota(**limits: int) -> tuple[Quota, ...]:
    return (Quota(QuotaKind.ADAPTER, "pirate", "adapter 'pirate'", **limits),)


def key_quota(**limits: int) -> tuple[Quota, ...]:
    return (Quota(QuotaKind.KEY, "d1", "this API key", **limits),)


def stage() -> Stage:
    return Stage(max_queued_requests=1000)


def refusal(stage: Stage, **wish: Any) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        stage.submit(**wish)
    return caught.value


async def finish(stage: Stage, number: int) -> None:
    await stage.engine.say(token(stage.engine.ids()[number], "a", FinishReason.LENGTH))


# -- requests ------------------------------------------------------------------------------------------


async def test_one_more_than_may_be_under_way_is_refused_and_queues_nothing() -> None:
    house, quotas = stage(), adapter_quota(max_requests=2)
    for _ in range(2):
        house.submit(quotas=quotas)
    error = refusal(house, quotas=quotas)
    assert len(house.engine.commands) == 2
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.message == "2 requests of adapter 'pirate' are under way, and 2 may be"
    assert (
        b'admission_rejections_total{engine="0",model_name="base",reason="adapter_requests"} 1.0'
        in (house.metrics.snapshot().render("")[0])
    )
    house.submit(quotas=key_quota(max_requests=2))
    house.submit()


async def test_choices_count_each_and_what_is_larger_than_the_limit_goes_alone() -> None:
    house, quotas = stage(), key_quota(max_requests=3)
    house.submit(n=2, quotas=quotas)
    refusal(house, n=2, quotas=quotas)
    house.submit(quotas=quotas)
    for number in range(3):
        await finish(house, number)
    house.submit(n=8, quotas=quotas)
    refusal(house, quotas=quotas)


async def test_retry_after_tells_when_one_of_them_will_have_ended() -> None:
    house, quotas = stage(), key_quota(max_requests=2)
    for _ in range(2):
        house.submit(quotas=quotas)
    assert refusal(house, quotas=quotas).retry_after_s == 1  # nobody knows
    house.now += 30.0
    await finish(house, 0)
    house.submit(quotas=quotas)
    assert refusal(house, quotas=quotas).retry_after_s == 15  # two take thirty seconds each


async def _natural(house: Stage, stream: TokenStream) -> None:
    await finish(house, 0)


async def _stop_string(house: Stage, stream: TokenStream) -> None:
    await house.engine.say(token(house.engine.ids()[0], "x"))
    await house.engine.say(end(house.engine.ids()[0], FinishReason.STOP))


async def _client_left(house: Stage, stream: TokenStream) -> None:
    stream.close()
    await house.engine.say(end(house.engine.ids()[0]))


async def _refused_by_the_engine(house: Stage, stream: TokenStream) -> None:
    await house.engine.say(end(house.engine.ids()[0], FinishReason.ERROR))


async def _engine_died(house: Stage, stream: TokenStream) -> None:
    house.service._receive(EngineDied("gone"))


async def _stopped(house: Stage, stream: TokenStream) -> None:
    await house.service.stop()


@pytest.mark.parametrize(
    "how", [_natural, _stop_string, _client_left, _refused_by_the_engine, _engine_died, _stopped]
)
async def test_every_end_gives_back_what_was_counted_once(
    how: Callable[[Stage, TokenStream], Awaitable[None]],
) -> None:
    house = stage()
    stream = house.submit(stop=("x",), quotas=(*adapter_quota(max_requests=1), *key_quota(max_requests=1)))
    await how(house, stream)
    await read(stream)
    stream.close()
    assert [usage.num_requests for usage in house.service._quotas._usages.values()] == [0, 0]


async def test_a_client_that_left_counts_until_the_engine_has_let_go() -> None:
    house, quotas = stage(), key_quota(max_requests=1)
    stream = house.submit(quotas=quotas)
    stream.close()
    refusal(house, quotas=quotas)
    await house.engine.say(end(house.engine.ids()[0]))
    house.submit(quotas=quotas)


async def test_a_request_that_one_quota_refuses_counts_against_none() -> None:
    house = stage()
    both = (*adapter_quota(max_requests=5), *key_quota(max_requests=1))
    house.submit(quotas=both)
    refusal(house, quotas=both)
    assert [usage.num_requests for usage in house.service._quotas._usages.values()] == [1, 1]


async def test_a_request_that_the_full_queue_refuses_counts_against_none() -> None:
    house, quotas = Stage(max_queued_requests=0), key_quota(max_requests=9)
    with pytest.raises(Overloaded):
        house.submit(n=9, quotas=quotas)
    assert not house.service._quotas._usages


# -- tokens --------------------------------------------------------------------------------------------


async def test_prompts_and_answers_use_up_the_tokens_of_a_minute() -> None:
    house, quotas = stage(), key_quota(tokens_per_minute=6)
    house.submit(quotas=quotas)  # three for its prompt
    house.submit(quotas=quotas)
    error = refusal(house, quotas=quotas)
    assert error.message == "the 6 tokens a minute of this API key are used up"
    assert b'reason="key_tokens"} 1.0' in house.metrics.snapshot().render("")[0]


async def test_retry_after_is_when_there_is_something_in_the_bucket_again() -> None:
    house, quotas = stage(), key_quota(tokens_per_minute=6)
    house.submit(prompts=((1,) * 9,), quotas=quotas)  # owes three
    wait = refusal(house, quotas=quotas).retry_after_s
    assert wait == 31
    house.now += 29.9
    assert refusal(house, quotas=quotas).retry_after_s == 1
    house.now += 1.1
    house.submit(quotas=quotas)


async def test_each_generated_token_is_taken_when_it_comes() -> None:
    house, quotas = stage(), adapter_quota(tokens_per_minute=60)
    house.submit(quotas=quotas)
    for _ in range(57):
        await house.engine.say(token(house.engine.ids()[0], "a"))
    assert refusal(house, quotas=quotas).retry_after_s == 1
    house.now += 1.5
    house.submit(quotas=quotas)


async def test_a_long_rest_saves_no_more_than_a_minutes_tokens() -> None:
    house, quotas = stage(), key_quota(tokens_per_minute=10)
    house.submit(prompts=((1,),), quotas=quotas)
    house.now += 3600.0
    house.submit(prompts=((1,) * 10,), quotas=quotas)
    refusal(house, quotas=quotas)
    await house.engine.say(token(house.engine.ids()[0], "a"))
    assert refusal(house, quotas=quotas).retry_after_s == 7


async def test_over_time_nobody_gets_more_than_its_tokens() -> None:
    house, quotas = stage(), key_quota(tokens_per_minute=600)
    began, used = house.now, 0
    while house.now < began + 600.0:
        house.now += 0.25
        try:
            house.submit(prompts=((1,) * 37,), quotas=quotas)
        except RateLimited:
            continue
        used += 37
    assert 600 * 10 <= used <= 600 * 11 + 37


async def test_idle_subjects_are_forgotten() -> None:
    house = stage()
    for number in range(2000):
        house.now += 1.0
        house.submit(quotas=(Quota(QuotaKind.KEY, str(number), "this API key", 5, 600),)).close()
        await house.engine.say(end(house.engine.ids()[number]))
    assert len(house.service._quotas._usages) < 300


async def test_without_quotas_nothing_is_kept() -> None:
    house = stage()
    house.submit()
    assert not house.service._quotas._usages
