"""The service against an engine that a test plays by hand: who is told what, and what is given back when."""

import asyncio
import gc
import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, cast

import pytest

from adapters.errors import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnavailable,
)
from adapters.recipes import MergeRecipe
from adapters.types import AdapterInfo, AdapterRef, AdapterUse, Revision
from server.engine.card import ModelCard
from server.engine.plan import (
    Add,
    Command,
    End,
    Pause,
    Resume,
    SampledToken,
    SequenceOutput,
    StepOutput,
    StepStats,
)
from server.engine.sequence import SequenceId, WaitReason
from server.engine.service import Service, ServiceLimits
from server.engine.stream import TokenStream
from server.engine.worker import EngineDied
from server.errors import BadRequest, ModelNotFound, Overloaded, ServeError, Unavailable
from server.metrics import Metrics
from server.text.adapter_text import AdapterText
from server.text.added_tokens import AddedToken
from server.text.tokenizer import Tokenizer
from server.types import FinishReason, GenerationRequest, Quota, SamplingParams, StopCriteria, TokenEvent
from server.wishes import AdapterWish, MergeWish, PartWish
from tests import made_tokenizers
from tests.server.engine.test_leases import ScriptedRegistry

TOKENIZER = Tokenizer(made_tokenizers.byte_level())
CARD = ModelCard("base", ("base", "alias"), 128, 0, "float32", "cpu", "cpu", "fp", vocab_size=0x110000)


class FakeLease:
    def __init__(self, name: str) -> None:
        self.ref = AdapterRef(name, Revision(name))
        self.info = AdapterInfo(self.ref, "", "local", rank=8, targets=(), num_bytes=1, created=0)
        self.invocation_tokens: tuple[int, ...] = ()
        self.extras: object | None = None
        self.releases = 0

    def release(self) -> None:
        self.releases += 1


class FakeRegistry:
    """Knows one name; raises what it was given for all others."""

    def __init__(self, error: AdapterError | None = None) -> None:
        self.error = error or AdapterNotFound("no adapter has this name")

    async def acquire(self, name: str, *, source: str | None = None, token: str | None = None) -> FakeLease:
        if name != "pirate":
            raise self.error
        return FakeLease(name)


class PlayedEngine:
    """Stands where EngineWorker stands: keeps the commands, says what the test says."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.num_acknowledged = 0
        self.ended = asyncio.Event()
        self.is_stopped = False

    def start(self, deliver: Any) -> None:
        self.deliver = deliver

    def put(self, command: Command) -> None:
        self.commands.append(command)
        if isinstance(command, End):
            self.ended.set()

    def acknowledge(self) -> None:
        self.num_acknowledged += 1

    def stop(self) -> None:
        self.is_stopped = True

    def ids(self) -> list[SequenceId]:
        return [command.id for command in self.commands if isinstance(command, Add)]

    def of(self, kind: type[Command]) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]

    async def say(
        self,
        *outputs: SequenceOutput,
        running: int = 0,
        waiting: int = 0,
        reason: WaitReason = WaitReason.CAPACITY,
    ) -> None:
        """One step's news, consumed when this returns unless it is longer than what is read at once."""
        by = ((reason, waiting),) if waiting else ()
        stats = StepStats(running, waiting, by, 0, 0, 0, 0, 0, 0, 8, (), (), (), 0.01)
        self.deliver(StepOutput(outputs, stats, at=5.0))
        await asyncio.sleep(0)


class Stage:
    """A service, its played engine, and short words for what tests do."""

    def __init__(self, **limits: Any) -> None:
        self.now = 2.0
        self.engine = PlayedEngine()
        self.metrics = Metrics("base", block_size=4, max_lora=4, is_accelerated=False)
        self.service = Service(
            card=CARD,
            tokenizer=TOKENIZER,
            registry=cast(Any, FakeRegistry()),
            pool=cast(Executor, None),
            worker=cast(Any, self.engine),
            metrics=self.metrics,
            limits=ServiceLimits(**({"max_num_seqs": 4, "max_queued_requests": 2} | limits)),
            clock=lambda: self.now,
        )
        self.service.start()

    def submit(
        self,
        *,
        n: int = 1,
        seed: int | None = 5,
        stop: Sequence[str] = (),
        lease: FakeLease | None = None,
        request_id: str = "r",
        prompts: tuple[tuple[int, ...], ...] = ((5, 6, 7),),
        quotas: tuple[Quota, ...] = (),
    ) -> TokenStream:
        criteria = StopCriteria(max_tokens=9, stop=tuple(stop))
        sampling = SamplingParams(seed=seed)
        request = GenerationRequest(
            request_id,
            prompts,
            sampling,
            criteria,
            None if lease is None else AdapterUse.of(lease.ref),
            n,
            received=1.0,
            quotas=quotas,
        )
        return self.service.submit(request, lease)


def token(sequence_id: SequenceId, text: str, finish: FinishReason | None = None) -> SequenceOutput:
    [token_id] = TOKENIZER.encode(text)
    return SequenceOutput(sequence_id, SampledToken(sequence_id, token_id), finish, None, 3.0, 0)


def end(sequence_id: SequenceId, finish: FinishReason = FinishReason.ABORT) -> SequenceOutput:
    return SequenceOutput(sequence_id, None, finish, None, 3.0, 0)


async def read(stream: TokenStream) -> list[TokenEvent]:
    return [event async for batch in stream for event in batch]


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "alias", "", "default", "tgi", "dummy", "__base_model__", None])
async def test_all_names_of_the_base_model_need_no_adapter(name: str | None) -> None:
    assert await Stage().service.resolve(name) is None


async def test_an_adapter_s_own_tokenizer_reads_and_writes_for_its_requests_alone() -> None:
    stage, own, plain = Stage(), FakeLease("pirate"), FakeLease("json")
    [end_id] = TOKENIZER.encode("y")
    cat = AddedToken("<cat>")
    own.extras = AdapterText(
        TOKENIZER.with_tokens((*TOKENIZER.added_tokens.values(), cat)).with_ends(frozenset({end_id}))
    )
    cat_id = own.extras.tokenizer.encode("<cat>")[0]
    assert stage.service.tokenizer_for(own) is own.extras.tokenizer
    assert stage.service.tokenizer_for(plain) is stage.service.tokenizer_for(None) is TOKENIZER

    texts = []
    for lease in (own, plain):
        stream = stage.submit(lease=lease)
        add = stage.engine.of(Add)[-1]
        assert add.stop.eos_token_ids == ((end_id,) if lease is own else ())
        sampled = SampledToken(add.id, cat_id)
        await stage.engine.say(SequenceOutput(add.id, sampled, FinishReason.LENGTH, None, 3.0, 0))
        texts.append((await read(stream))[-1].text)
    assert texts == ["<cat>", ""]


async def test_an_adapter_s_own_end_is_not_part_of_the_answer() -> None:
    stage, lease = Stage(), FakeLease("pirate")
    [end_id] = TOKENIZER.encode("y")
    lease.extras = AdapterText(TOKENIZER.with_ends(frozenset({end_id})))
    stream = stage.submit(lease=lease)
    [sequence_id] = stage.engine.ids()
    await stage.engine.say(token(sequence_id, "x"), token(sequence_id, "y", FinishReason.STOP))
    [*_, last] = await read(stream)
    assert last.finish is not None
    assert (last.finish.generated_text, last.finish.stop) == ("x", None)


async def test_any_other_name_is_an_adapter_s() -> None:
    lease = await Stage().service.resolve("pirate")
    assert lease is not None
    assert lease.use.name == "pirate"


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (AdapterNotFound("m"), ModelNotFound),
        (AdapterInvalid("m"), BadRequest),
        (AdapterIncompatible("m"), BadRequest),
        (AdapterTooLarge("m"), BadRequest),
        (AdapterUnavailable("m", retry_after_s=3), Unavailable),
    ],
)
async def test_an_adapter_that_cannot_be_had_is_a_refusal_by_name(
    error: AdapterError, refusal: type[ServeError]
) -> None:
    stage = Stage()
    stage.service.registry = cast(Any, FakeRegistry(error))
    with pytest.raises(refusal) as refused:
        await stage.service.resolve("unknown")
    assert (refused.value.message, refused.value.param) == ("m", "model")
    assert refused.value.retry_after_s == getattr(error, "retry_after_s", None)


async def test_a_wish_for_several_adapters_stands_in_place_of_a_name() -> None:
    stage = Stage()
    stage.service.registry = cast(Any, ScriptedRegistry())
    parts = (PartWish("ant", 0.5, "lora[0].name"), PartWish("bee", 2.0, "lora[1].name"))
    lease = await stage.service.resolve(None, AdapterWish(parts=parts))
    assert lease is not None
    assert lease.use.name == "ant:0.5+bee:2"
    assert await stage.service.resolve(None, AdapterWish(parts=())) is None


async def test_merges_are_refused_where_nobody_can_merge() -> None:
    merge = MergeWish(("ant",), MergeRecipe((1.0,)))
    with pytest.raises(BadRequest) as refused:
        await Stage().service.resolve(None, AdapterWish(merge=merge))
    assert refused.value.param == "merged_adapters"


# --- adapters that begin inside a prompt ------------------------------------------------------------------


async def test_adapter_begins_where_each_prompt_invokes_it_last() -> None:
    stage = Stage(max_queued_requests=100)
    use = AdapterUse.of(AdapterRef("a", Revision("r")))
    prompts = ((7, 8, 1, 7, 8, 2), (1, 2, 3), (7, 8))
    request = GenerationRequest(
        "r", prompts, SamplingParams(), StopCriteria(max_tokens=9), use, 2, invocation_tokens=(7, 8)
    )
    stage.service.submit(request, FakeLease("a"))
    begun = [(add.adapter, add.adapter_start) for add in stage.engine.of(Add)]
    assert begun == [(use, 3), (use, 3), (None, 0), (None, 0), (use, 0), (use, 0)]


async def test_adapter_that_a_prompt_does_not_invoke_is_held_and_named_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="motet.requests")
    stage, lease = Stage(), FakeLease("a")
    request = GenerationRequest(
        "r",
        ((1, 2, 3),),
        SamplingParams(),
        StopCriteria(max_tokens=9),
        AdapterUse.of(lease.ref),
        invocation_tokens=(7, 8),
    )
    stream = stage.service.submit(request, lease)
    [one] = stage.engine.ids()
    assert lease.releases == 0
    await stage.engine.say(token(one, "a", FinishReason.LENGTH))
    await read(stream)
    assert lease.releases == 1
    assert "adapter=a " in caplog.text


# --- the plain course -------------------------------------------------------------------------------------


async def test_tokens_come_in_order_and_the_stream_ends_with_the_finish() -> None:
    stage = Stage()
    stream = stage.submit()
    [one] = stage.engine.ids()
    await stage.engine.say(token(one, "a"))
    assert [event.text for event in await anext(stream)] == ["a"]
    await stage.engine.say(token(one, "b"))
    await stage.engine.say(token(one, "c", FinishReason.LENGTH))
    events = await read(stream)
    assert [event.text for event in events] == ["b", "c"]
    assert events[-1].finish is not None
    assert events[-1].finish.generated_text == "abc"
    assert stage.engine.num_acknowledged == 3
    assert (stream.request_id, stream.num_prompt) == ("r", 3)


async def test_news_of_a_large_batch_leave_the_loop_to_others_and_stay_in_order() -> None:
    """A slice of readers at a time: nobody waits for the whole batch, and the next step waits its turn."""
    stage = Stage(max_num_seqs=100)
    heard: dict[SequenceId, str] = {}

    async def listen(stream: TokenStream, id: SequenceId) -> None:
        async for batch in stream:
            heard[id] = heard.get(id, "") + "".join(event.text for event in batch)

    streams = [stage.submit() for _ in range(100)]
    ids = stage.engine.ids()
    listeners = [asyncio.create_task(listen(*pair)) for pair in zip(streams, ids, strict=True)]
    await asyncio.sleep(0)
    await stage.engine.say(*(token(id, "a") for id in ids))
    await stage.engine.say(*(token(id, "b", FinishReason.LENGTH) for id in ids))
    progress = [0]
    while stage.engine.num_acknowledged < 2:
        progress.append(sum(map(len, heard.values())))
        await asyncio.sleep(0)
    await asyncio.gather(*listeners)
    assert max(after - before for before, after in itertools.pairwise(progress)) <= 32
    assert heard == dict.fromkeys(ids, "ab")


async def test_choices_are_told_apart_by_index_and_seeded_one_after_the_other() -> None:
    stage = Stage()
    stream = stage.submit(n=3, seed=40)
    ids = stage.engine.ids()
    assert [add.seed for add in stage.engine.of(Add)] == [40, 41, 42]
    await stage.engine.say(
        *(token(id, text, FinishReason.LENGTH) for id, text in zip(ids, "xyz", strict=True))
    )
    events = await read(stream)
    assert [(event.index, event.text) for event in events] == [(0, "x"), (1, "y"), (2, "z")]
    assert [event.finish.seed for event in events if event.finish] == [40, 41, 42]


async def test_a_seed_is_drawn_when_the_client_brings_none() -> None:
    stage = Stage(max_queued_requests=100)
    streams = [stage.submit(seed=None) for _ in range(20)]
    seeds = [add.seed for add in stage.engine.of(Add)]
    assert len(set(seeds)) == len(streams)
    assert all(0 <= seed < 2**53 for seed in seeds)


async def test_choices_are_numbered_prompt_by_prompt() -> None:
    stage = Stage(max_queued_requests=100)
    stream = stage.submit(n=2, seed=40, prompts=((5,), (6, 7, 8)))
    added = stage.engine.of(Add)
    assert [add.prompt_ids for add in added] == [(5,), (5,), (6, 7, 8), (6, 7, 8)]
    assert stream.num_prompt == 4
    await stage.engine.say(
        *(token(id, text, FinishReason.LENGTH) for id, text in zip(stage.engine.ids(), "wxyz", strict=True))
    )
    events = await read(stream)
    assert [(event.index, event.text) for event in events] == [(0, "w"), (1, "x"), (2, "y"), (3, "z")]
    assert [event.finish.usage.prompt_tokens for event in events if event.finish] == [1, 1, 3, 3]


async def test_with_a_seed_each_prompt_of_a_request_is_drawn_as_if_it_were_alone() -> None:
    stage = Stage(max_queued_requests=100)
    stream = stage.submit(n=2, seed=40, prompts=((5,), (5,)))
    assert [add.seed for add in stage.engine.of(Add)] == [40, 41, 40, 41]
    stream.close()


async def test_without_a_seed_equal_prompts_of_a_request_differ() -> None:
    stage = Stage(max_queued_requests=100)
    stream = stage.submit(n=2, seed=None, prompts=((5,), (5,)))
    assert len({add.seed for add in stage.engine.of(Add)}) == 4
    stream.close()


async def test_a_request_is_logged_with_all_its_prompts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stage = Stage(max_queued_requests=100)
    stream = stage.submit(n=2, prompts=((5,), (6, 7, 8)))
    await stage.engine.say(*(token(id, "x", FinishReason.LENGTH) for id in stage.engine.ids()))
    await read(stream)
    assert "n=4 prompt=4 cached=0 generated=4" in caplog.text


async def test_ids_rise_over_requests() -> None:
    stage = Stage()
    streams = [stage.submit(n=2), stage.submit()]
    assert stage.engine.ids() == sorted(stage.engine.ids())
    assert len(streams) == 2


async def test_the_adapter_goes_with_every_choice_and_is_released_after_the_last() -> None:
    stage, lease = Stage(), FakeLease("pirate")
    stream = stage.submit(n=2, lease=lease)
    one, two = stage.engine.ids()
    assert {add.adapter for add in stage.engine.of(Add)} == {AdapterUse.of(lease.ref)}
    await stage.engine.say(token(one, "a", FinishReason.LENGTH))
    assert lease.releases == 0
    await stage.engine.say(token(two, "b", FinishReason.LENGTH))
    assert lease.releases == 1
    stream.close()
    assert lease.releases == 1


# --- stop strings -----------------------------------------------------------------------------------------


async def test_a_stop_string_ends_the_choice_for_the_client_at_once_and_for_the_engine_when_it_says_so() -> (
    None
):
    stage, lease = Stage(), FakeLease("pirate")
    stream = stage.submit(stop=["END"], lease=lease)
    [one] = stage.engine.ids()
    for character in "xEND":
        await stage.engine.say(token(one, character))
    events = await read(stream)
    assert events[-1].finish is not None
    assert (events[-1].finish.reason, events[-1].finish.stop) == (FinishReason.STOP, "END")
    assert stage.engine.of(End) == [End(one, FinishReason.STOP)]
    assert lease.releases == 0
    await stage.engine.say(token(one, "y"))  # was under way
    await stage.engine.say(end(one, FinishReason.STOP))
    assert lease.releases == 1
    assert stage.engine.of(End) == [End(one, FinishReason.STOP)]


async def test_a_stop_string_in_the_last_token_needs_no_end() -> None:
    stage = Stage()
    stream = stage.submit(stop=["b"])
    [one] = stage.engine.ids()
    await stage.engine.say(token(one, "b", FinishReason.LENGTH))
    [event] = await read(stream)
    assert event.finish is not None
    assert event.finish.reason is FinishReason.STOP
    assert stage.engine.of(End) == []


# --- the client leaves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
async def test_closing_ends_every_choice_once_and_releases_when_the_engine_confirms(num_tokens: int) -> None:
    stage, lease = Stage(), FakeLease("pirate")
    stream = stage.submit(n=2, lease=lease)
    one, two = stage.engine.ids()
    for _ in range(num_tokens):
        await stage.engine.say(token(one, "a"), token(two, "b"))
    stream.close()
    stream.close()
    assert stage.engine.of(End) == [End(one, FinishReason.ABORT), End(two, FinishReason.ABORT)]
    assert await read(stream) == []
    await stage.engine.say(token(one, "a"), end(two))
    assert lease.releases == 0
    await stage.engine.say(end(one))
    assert lease.releases == 1


async def test_closing_after_the_end_tells_the_engine_nothing() -> None:
    stage = Stage()
    stream = stage.submit()
    [one] = stage.engine.ids()
    await stage.engine.say(token(one, "a", FinishReason.LENGTH))
    stream.close()
    assert stage.engine.of(End) == []


async def test_closing_ends_only_the_choices_that_still_run() -> None:
    stage = Stage()
    stream = stage.submit(n=2)
    one, two = stage.engine.ids()
    await stage.engine.say(token(one, "a", FinishReason.LENGTH))
    stream.close()
    assert stage.engine.of(End) == [End(two, FinishReason.ABORT)]


async def test_an_end_that_crosses_the_engine_s_own_end_is_harmless() -> None:
    stage, lease = Stage(), FakeLease("pirate")
    stream = stage.submit(lease=lease)
    [one] = stage.engine.ids()
    stream.close()
    await stage.engine.say(token(one, "a", FinishReason.LENGTH))
    assert lease.releases == 1


async def test_a_stream_that_nobody_holds_any_more_is_ended() -> None:
    stage, lease = Stage(), FakeLease("pirate")
    stage.submit(lease=lease)
    gc.collect()
    await asyncio.sleep(0)
    [one] = stage.engine.ids()
    assert stage.engine.of(End) == [End(one, FinishReason.ABORT)]
    await stage.engine.say(end(one))
    assert lease.releases == 1


# --- slow readers -----------------------------------------------------------------------------------------


async def test_a_reader_far_behind_is_paused_and_goes_on_when_it_has_read() -> None:
    """Z8: what is kept for it is bounded."""
    stage = Stage(max_unread_tokens=3)
    stream = stage.submit(n=2)
    one, two = stage.engine.ids()
    for _ in range(3):
        await stage.engine.say(token(one, "a"), token(two, "b"))
    assert stage.engine.of(Pause) == [Pause(one), Pause(two)]
    assert len(await anext(stream)) == 6
    assert stage.engine.of(Resume) == [Resume(one), Resume(two)]
    await stage.engine.say(token(one, "c", FinishReason.LENGTH), token(two, "c", FinishReason.LENGTH))
    assert [event.text for event in await read(stream)] == ["c", "c"]
    assert stage.engine.of(End) == []


async def test_a_reader_that_keeps_up_is_never_paused() -> None:
    stage = Stage(max_unread_tokens=3)
    stream = stage.submit()
    [one] = stage.engine.ids()
    for _ in range(20):
        await stage.engine.say(token(one, "a"))
        await anext(stream)
    assert stage.engine.of(Pause) == []


async def test_a_paused_reader_that_does_not_come_back_gets_an_error_at_the_end() -> None:
    stage, lease = Stage(max_unread_tokens=2, send_timeout_s=0.01), FakeLease("pirate")
    stream = stage.submit(lease=lease)
    [one] = stage.engine.ids()
    for _ in range(3):
        await stage.engine.say(token(one, "a"))
    await asyncio.wait_for(stage.engine.ended.wait(), 10)
    assert stage.engine.of(End) == [End(one, FinishReason.ABORT)]
    await stage.engine.say(end(one))
    assert lease.releases == 1
    events = await read(stream)
    assert [event.text for event in events] == ["a", "a", "a", ""]
    assert events[-1].finish is not None
    assert events[-1].finish.reason is FinishReason.ERROR
    assert "has not read" in (events[-1].finish.error or "")


async def test_a_stream_that_ends_while_paused_forgets_its_patience() -> None:
    stage = Stage(max_unread_tokens=1, send_timeout_s=3600)
    stream = stage.submit()
    [one] = stage.engine.ids()
    await stage.engine.say(token(one, "a"))
    await stage.engine.say(token(one, "a"))
    [pause] = stage.engine.of(Pause)
    stream.close()
    assert pause.id == one
    assert not any(not handle.cancelled() for handle in asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]


async def test_a_paused_stream_does_not_hold_up_others() -> None:
    """Z8."""
    stage = Stage(max_unread_tokens=1)
    slow, fast = stage.submit(), stage.submit()
    one, two = stage.engine.ids()
    for _ in range(5):
        await stage.engine.say(token(one, "a"), token(two, "b"))
        assert [event.text for event in await anext(fast)] == ["b"]
    assert [pause.id for pause in stage.engine.of(Pause)] == [one]
    slow.close()


# --- streams on hold --------------------------------------------------------------------------------------


def orders(stage: Stage) -> list[Command]:
    """What the engine was told beside the requests themselves."""
    return [command for command in stage.engine.commands if not isinstance(command, Add)]


def pending_timers() -> list[asyncio.TimerHandle]:
    return [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]


async def test_a_stream_on_hold_is_paused_and_goes_on_when_told() -> None:
    stage = Stage()
    stream = stage.submit(n=2)
    one, two = stage.engine.ids()
    stream.pause()
    stream.pause()
    stream.resume()
    stream.resume()
    assert orders(stage) == [Pause(one), Pause(two), Resume(one), Resume(two)]
    stream.close()


async def test_a_stream_is_paused_while_it_is_on_hold_or_its_reader_is_behind() -> None:
    stage = Stage(max_unread_tokens=1, send_timeout_s=3600)
    stream = stage.submit()
    [one] = stage.engine.ids()
    await stage.engine.say(token(one, "a"))
    await stage.engine.say(token(one, "b"))  # behind
    stream.pause()
    stream.resume()
    assert orders(stage) == [Pause(one)]
    stream.pause()
    assert len(await anext(stream)) == 2  # caught up, but on hold
    assert orders(stage) == [Pause(one)]
    stream.resume()
    assert orders(stage) == [Pause(one), Resume(one)]
    stream.close()


async def test_patience_does_not_run_out_on_a_stream_on_hold() -> None:
    """Nobody is meant to read it; whoever put it on hold sets the limit."""
    stage = Stage(max_unread_tokens=1, send_timeout_s=0.01)
    stream = stage.submit()
    [one] = stage.engine.ids()
    stream.pause()
    await stage.engine.say(token(one, "a"))
    await stage.engine.say(token(one, "b"))  # was under way
    assert not pending_timers()
    stream.resume()  # there is a reader again, and it is behind
    assert pending_timers()
    await asyncio.wait_for(stage.engine.ended.wait(), 10)
    assert orders(stage) == [Pause(one), End(one, FinishReason.ABORT)]


async def test_a_stream_that_ends_on_hold_leaves_nothing_behind() -> None:
    stage, lease = Stage(max_unread_tokens=1, send_timeout_s=3600), FakeLease("pirate")
    stream = stage.submit(lease=lease)
    [one] = stage.engine.ids()
    stream.pause()
    await stage.engine.say(token(one, "a"))
    await stage.engine.say(token(one, "b"))
    await stage.engine.say(token(one, "c", FinishReason.LENGTH))
    stream.resume()
    assert [event.text for event in await read(stream)] == ["a", "b", "c"]
    assert orders(stage) == [Pause(one)]
    assert lease.releases == 1
    assert not pending_timers()


async def test_a_stream_on_hold_counts_in_the_drain_and_gets_its_end() -> None:
    stage = Stage()
    stream = stage.submit()
    [one] = stage.engine.ids()
    stream.pause()
    draining = asyncio.create_task(stage.service.drain(0.01))
    await asyncio.wait_for(stage.engine.ended.wait(), 10)
    assert not draining.done(), "until the engine has let go of it"
    await stage.engine.say(end(one))
    await draining
    stream.resume()
    [event] = await read(stream)
    assert event.finish is not None
    assert event.finish.reason is FinishReason.ABORT


# --- too many, too late -----------------------------------------------------------------------------------


async def test_beyond_the_queue_requests_are_refused_and_keep_their_lease() -> None:
    stage, lease = Stage(max_num_seqs=2, max_queued_requests=1), FakeLease("pirate")
    streams = [stage.submit() for _ in range(3)]
    with pytest.raises(Overloaded) as refused:
        stage.submit(lease=lease)
    assert refused.value.retry_after_s is not None
    assert 1 <= refused.value.retry_after_s <= 60
    assert lease.releases == 0
    assert len(stage.engine.ids()) == 3
    assert (
        b'admission_rejections_total{engine="0",model_name="base",reason="queue_full"} 1.0'
        in stage.metrics.snapshot().render("")[0]
    )
    await stage.engine.say(end(stage.engine.ids()[0]))
    streams.append(stage.submit())


async def test_clients_are_told_to_come_back_when_the_queue_will_have_moved() -> None:
    stage = Stage(max_num_seqs=1, max_queued_requests=1)
    for _ in range(3):
        stage.submit()
        await stage.engine.say(end(stage.engine.ids()[-1]))
        stage.now += 10.0
    streams = [stage.submit(), stage.submit()]
    with pytest.raises(Overloaded) as refused:
        stage.submit()
    assert refused.value.retry_after_s == 20
    assert len(streams) == 2


async def test_readers_that_are_paused_do_not_make_the_queue_full() -> None:
    stage = Stage(max_num_seqs=10, max_queued_requests=0)
    streams = [stage.submit() for _ in range(3)]
    await stage.engine.say(running=1, waiting=2, reason=WaitReason.READER)
    streams.append(stage.submit())


async def test_where_memory_is_short_the_queue_begins_earlier() -> None:
    stage = Stage(max_num_seqs=100, max_queued_requests=2)
    streams = [stage.submit() for _ in range(3)]
    await stage.engine.say(running=1, waiting=2)
    with pytest.raises(Overloaded):
        stage.submit()
    assert len(streams) == 3


async def test_draining_refuses_new_requests_and_lets_running_ones_end() -> None:
    stage = Stage()
    stream = stage.submit()
    [one] = stage.engine.ids()
    draining = asyncio.create_task(stage.service.drain(3600))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as refused:
        stage.submit()
    assert refused.value.retry_after_s
    await stage.engine.say(token(one, "a", FinishReason.LENGTH))
    await draining
    [event] = await read(stream)
    assert event.finish is not None
    assert event.finish.reason is FinishReason.LENGTH


async def test_draining_ends_the_rest_with_an_error_event_after_its_time() -> None:
    stage, lease = Stage(), FakeLease("pirate")
    stream = stage.submit(lease=lease)
    [one] = stage.engine.ids()
    await stage.engine.say(token(one, "a"))
    draining = asyncio.create_task(stage.service.drain(0))
    await asyncio.wait_for(stage.engine.ended.wait(), 10)
    events = await read(stream)
    assert events[-1].finish is not None
    assert events[-1].finish.reason is FinishReason.ABORT
    assert events[-1].finish.error == "the server is shutting down"
    assert events[-1].finish.generated_text == "a"
    await stage.engine.say(end(one))
    await draining
    assert lease.releases == 1


async def test_draining_an_idle_server_is_over_at_once() -> None:
    await Stage().service.drain(0)


# --- failures ---------------------------------------------------------------------------------------------


async def test_when_the_engine_dies_every_stream_ends_with_an_error_and_nothing_is_held() -> None:
    stage, lease = Stage(), FakeLease("pirate")
    streams = [stage.submit(n=2, lease=lease), stage.submit()]
    await stage.engine.say(token(stage.engine.ids()[0], "a"))
    assert stage.service.is_alive
    stage.engine.deliver(EngineDied("the engine has stopped"))
    await asyncio.wait_for(stage.service.died(), 10)
    for stream in streams:
        finishes = [event.finish for event in await read(stream) if event.finish]
        assert {finish.reason for finish in finishes} == {FinishReason.ERROR}
        assert {finish.error for finish in finishes} == {"the engine has stopped"}
    assert lease.releases == 1
    assert not stage.service.is_alive
    with pytest.raises(Unavailable):
        stage.submit()
    await stage.service.drain(3600)


async def test_news_of_a_request_that_was_given_up_is_ignored() -> None:
    stage = Stage()
    stream = stage.submit()
    [one] = stage.engine.ids()
    stage.engine.deliver(EngineDied("dead"))
    await stage.engine.say(token(one, "a"))
    assert [event.token for event in await read(stream)] == [None]


async def test_a_bug_in_one_answer_costs_that_request_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    broken, fine = stage.submit(request_id="broken"), stage.submit()
    one, two = stage.engine.ids()
    [bad] = TOKENIZER.encode("a")
    honest = TOKENIZER.special_text

    def special_text(token_id: int) -> str | None:
        if token_id == bad:
            raise KeyError("the secret answer")
        return honest(token_id)

    monkeypatch.setattr(TOKENIZER, "special_text", special_text)
    await stage.engine.say(token(one, "a"), token(two, "b", FinishReason.LENGTH))
    [event] = await read(broken)
    assert event.finish is not None
    assert (event.finish.reason, event.finish.error) == (FinishReason.ERROR, "internal error")
    assert [event.text for event in await read(fine)] == ["b"]
    assert stage.engine.of(End) == [End(one, FinishReason.ABORT)]
    assert stage.engine.num_acknowledged == 1
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text


async def test_stopping_ends_what_still_runs() -> None:
    stage, lease = Stage(), FakeLease("pirate")
    stream = stage.submit(lease=lease)
    await stage.service.stop()
    [event] = await read(stream)
    assert event.finish is not None
    assert event.finish.reason is FinishReason.ERROR
    assert stage.engine.is_stopped
    assert lease.releases == 1


def test_a_closed_event_loop_does_not_hang_the_engine_thread() -> None:
    async def begin() -> tuple[Stage, TokenStream]:
        stage = Stage()
        return stage, stage.submit()

    stage, stream = asyncio.run(begin())
    [one] = stage.engine.ids()
    stats = StepStats(0, 0, (), 0, 0, 0, 0, 0, 0, 0, (), (), (), 0.0)
    stage.engine.deliver(StepOutput((token(one, "a"),), stats, at=1.0))
    stage.engine.deliver(EngineDied("dead"))
    assert stage.engine.num_acknowledged == 1
    assert stage.engine.of(End) == [End(one, FinishReason.ABORT)]
    del stream


# --- what is written down ---------------------------------------------------------------------------------


async def test_a_finished_request_is_one_log_line_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    stage = Stage()
    stream = stage.submit(request_id="req-7")
    [one] = stage.engine.ids()
    for character in "Zebra":
        await stage.engine.say(token(one, character))
    await stage.engine.say(token(one, "!", FinishReason.STOP))
    events = await read(stream)
    assert events[-1].finish is not None
    assert "Zebra" in events[-1].finish.generated_text
    [line] = [record.getMessage() for record in caplog.records if record.name == "motet.requests"]
    assert "req-7" in line
    assert "finish=stop" in line
    assert "Zebra" not in caplog.text
    assert (
        b'request_success_total{engine="0",finished_reason="stop",model_name="base"} 1.0'
        in stage.metrics.snapshot().render("")[0]
    )


# --- adapters ---------------------------------------------------------------------------------------------


async def test_tokens_and_waits_are_counted_for_the_adapter_of_the_request() -> None:
    stage = Stage()
    streams = [stage.submit(lease=FakeLease("pirate")), stage.submit(n=2)]
    with_adapter, *_ = stage.engine.ids()
    for character in "abc":
        await stage.engine.say(token(with_adapter, character))
    await stage.engine.say(token(with_adapter, "d", FinishReason.LENGTH))
    text = stage.metrics.snapshot().render("")[0].decode()

    def of(family: str) -> float:
        [line] = [x for x in text.splitlines() if x.startswith(family) and 'adapter="pirate"' in x]
        return float(line.rpartition(" ")[2])

    assert of("motet_adapter_first_token_seconds_count") == 1
    assert of("motet_adapter_inter_token_seconds_count") == 3
    assert of("motet_adapter_queue_seconds_sum") == 1.0  # handed over at 2, started at 3
    assert of("motet_adapter_generated_tokens_total") == 4
    assert len(streams) == 2


async def test_what_is_resident_is_as_of_the_newest_step() -> None:
    stage = Stage()
    assert stage.service.resident == frozenset()
    refs = (AdapterRef("a", Revision("one")), AdapterRef("twin", Revision("one")))
    stats = StepStats(0, 0, (), 0, 0, 0, 0, 0, 0, 8, refs, (), (), 0.01)
    stage.engine.deliver(StepOutput((), stats, at=5.0))
    await asyncio.sleep(0)
    assert stage.service.resident == {"one"}
