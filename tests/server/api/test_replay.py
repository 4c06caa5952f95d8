"""Streams that outlive their connections: what is kept, for whom, for how long and how much. Row J9."""

import asyncio
from collections import deque
from contextlib import aclosing
from typing import Any

import pytest

from server.api.replay import Miss, Reader, Recordings, ReplayLimits
from tests.fakes import FakeClock

OURS, THEIRS = b"ours", b"theirs"
WINDOW_S = 30.0


class FakeSource:
    """Events as the test puts them; one batch a take."""

    def __init__(self, *batches: list[bytes]) -> None:
        self.batches = deque(batches)
        self.news = asyncio.Event()
        self.is_over = False
        self.is_ending = False
        self.is_being_taken_from = False
        self.is_paused = False
        self.is_closed = False
        self.joins: list[bool] = []

    def put(self, *events: bytes) -> None:
        self.batches.append(list(events))
        self.news.set()

    def end(self, *events: bytes) -> None:
        self.is_ending = True
        self.put(*events)

    async def take(self, *, join: bool) -> list[bytes]:
        assert not self.is_being_taken_from, "a source has one reader"
        self.is_being_taken_from = True
        try:
            while not self.batches:
                self.news.clear()
                await self.news.wait()
        finally:
            self.is_being_taken_from = False
        self.joins.append(join)
        events = self.batches.popleft()
        self.is_over = self.is_ending and not self.batches
        return events

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False

    def close(self) -> None:
        self.is_closed = True


class Stage:
    """Recordings with a clock and ids that can be told in advance: g1, g2, ..."""

    def __init__(self, **limits: Any) -> None:
        self.clock = FakeClock()
        self.num_ids = 0
        self.recordings = Recordings(ReplayLimits(**{"window_s": WINDOW_S} | limits), self.clock, self.new_id)

    def new_id(self) -> str:
        self.num_ids += 1
        return f"g{self.num_ids}"

    def begin(self, source: FakeSource, whose: bytes = OURS) -> Reader:
        return self.recordings.begin(whose, source, {"x-model-id": "base"})

    def go_on(self, event_id: str, whose: bytes = OURS) -> Reader:
        reader = self.recordings.go_on(event_id, whose)
        assert isinstance(reader, Reader)
        return reader

    def drop_after_one(self, source: FakeSource | None = None) -> "asyncio.Task[list[bytes]]":
        """A new recording whose reader leaves after its first event."""

        async def whole() -> list[bytes]:
            reader = self.begin(source or FakeSource([b"a", b"b"]))
            events = await read(reader, 1)
            reader.leave()
            return events

        return asyncio.ensure_future(whole())


def never() -> bool:
    return False


async def read(reader: Reader, count: int | None = None) -> list[bytes]:
    """So many events; all without a count."""

    events: list[bytes] = []
    async with asyncio.timeout(10), aclosing(reader.events(never)) as stream:
        while count is None or len(events) < count:
            event = await anext(stream, None)
            if event is None:
                break
            events.append(event)
    return events


async def test_events_are_numbered_from_one_and_the_id_comes_first() -> None:
    stage = Stage()
    source = FakeSource([b"data: a\n\n", b"data: b\n\n"], [b"data: c\n\n"])
    source.is_ending = True
    events = await read(stage.begin(source))

    assert events == [b"id: g1:1\ndata: a\n\n", b"id: g1:2\ndata: b\n\n", b"id: g1:3\ndata: c\n\n"]


async def test_ids_cannot_be_guessed() -> None:
    recordings = Recordings(ReplayLimits(), FakeClock())
    ids = set()
    for _ in range(100):
        [event] = await read(recordings.begin(OURS, FakeSource([b"\n"]), {}), 1)
        ids.add(event.removeprefix(b"id: ").partition(b":")[0])
    assert len(ids) == 100
    assert all(len(each) == 22 for each in ids), "128 random bits"


async def test_J9_a_dropped_stream_goes_on_after_the_event_that_its_client_saw() -> None:
    """Also where the server had handed out more than arrived."""
    stage = Stage()
    source = FakeSource([b"a", b"b", b"c"], [b"d"])
    source.is_ending = True
    first = stage.begin(source)
    seen = await read(first, 2)
    first.leave()
    assert source.is_paused

    again = stage.go_on("g1:1")
    assert not source.is_paused
    assert await read(again) == [seen[1], b"id: g1:3\nc", b"id: g1:4\nd"]
    assert again.headers == {"x-model-id": "base"}


async def test_a_reader_that_is_cancelled_while_it_waits_loses_nothing() -> None:
    stage, source = Stage(), FakeSource([b"a"])
    reader = stage.begin(source)
    reading = asyncio.ensure_future(read(reader))
    await settle()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    reader.leave()
    source.end(b"b")

    assert await read(stage.go_on("g1:1")) == [b"id: g1:2\nb"]


async def test_a_client_that_has_seen_the_end_gets_nothing_and_one_that_has_not_gets_the_rest() -> None:
    """J8: and this after the generation is over."""
    stage, source = Stage(), FakeSource()
    source.end(b"a", b"[DONE]")
    reader = stage.begin(source)
    await read(reader)
    reader.leave()

    assert stage.recordings.go_on("g1:2", OURS) is Miss.NOTHING_LEFT
    again = stage.go_on("g1:1")
    assert await read(again) == [b"id: g1:2\n[DONE]"]
    again.leave()
    assert stage.recordings.go_on("g1:2", OURS) is Miss.NOTHING_LEFT


@pytest.mark.parametrize(
    "event_id",
    [
        "g2:1",
        "g1:9",
        "g1:0",
        "g1:-1",
        "g1:01",
        "g1",
        "g1:",
        ":1",
        "",
        "g1:1:1",
        "g1:1 ",
        "g1:99999999999",
        "é:1",
    ],
)
async def test_an_event_that_was_never_sent_is_not_gone_on_after(event_id: str) -> None:
    stage = Stage()
    await stage.drop_after_one()
    assert stage.recordings.go_on(event_id, OURS) is Miss.NOTHING_LEFT


async def test_an_event_of_another_request_is_told_apart_from_an_unknown_one() -> None:
    stage = Stage()
    await stage.drop_after_one()
    assert stage.recordings.go_on("g1:1", THEIRS) is Miss.FOREIGN
    assert stage.recordings.num_paused == 1, "nor is it disturbed"


def test_fingerprints_differ_with_every_part_and_hide_all_of_them() -> None:
    recordings = Recordings(ReplayLimits(), FakeClock())
    parts = (b"key", "job", "prompt", 256, 0.7, None)
    others = [
        (*parts[:i], other, *parts[i + 1 :]) for i, other in enumerate((b"kez", "joc", "p", 255, 0.8, 1))
    ]
    prints = {
        recordings.fingerprint(*each) for each in (parts, *others, (b"key", "jobp", "rompt", 256, 0.7, None))
    }
    assert len(prints) == 8
    assert recordings.fingerprint(*parts) in prints
    assert Recordings(ReplayLimits(), FakeClock()).fingerprint(*parts) not in prints, "salted"


async def test_of_two_readers_the_newer_wins_while_the_older_waits() -> None:
    stage, source = Stage(), FakeSource([b"a"])
    older = stage.begin(source)
    reading = asyncio.ensure_future(read(older))
    await settle()
    newer = stage.go_on("g1:1")
    rest = asyncio.ensure_future(read(newer))
    assert await asyncio.wait_for(reading, 10) == [b"id: g1:1\na"]
    older.leave()
    assert not source.is_paused, "the older one's end is not the newer one's"
    source.end(b"b")
    assert await rest == [b"id: g1:2\nb"]


async def test_of_two_readers_the_newer_wins_while_the_older_writes() -> None:
    stage = Stage()
    source = FakeSource([b"a", b"b"])
    source.is_ending = True
    older = stage.begin(source)
    events = older.events(never)
    await anext(events)  # and is writing it
    newer = stage.go_on("g1:1")
    assert await read(newer) == [b"id: g1:2\nb"]
    assert await anext(events, None) is None


async def test_of_many_readers_in_one_moment_the_newest_wins_and_nothing_is_lost() -> None:
    stage, source = Stage(), FakeSource([b"a"])
    readers = [stage.begin(source)]
    tasks = [asyncio.ensure_future(read(readers[0]))]
    await settle()
    for _ in range(4):
        readers.append(stage.go_on("g1:1"))
        tasks.append(asyncio.ensure_future(read(readers[-1])))
        await asyncio.sleep(0)
    await settle()
    assert [task.done() for task in tasks] == [True, True, True, True, False]
    source.end(b"b")
    answers = await asyncio.gather(*tasks)
    assert answers == [[b"id: g1:1\na"], [], [], [], [b"id: g1:2\nb"]]


async def test_an_event_that_arrives_with_the_newer_reader_is_given_once() -> None:
    """The older reader's wait is over in the very moment in which it loses its place."""
    stage, source = Stage(), FakeSource([b"a"])
    reading = asyncio.ensure_future(read(stage.begin(source)))
    await settle()
    source.put(b"b")  # wakes the older one, which has not run yet
    newer = asyncio.ensure_future(read(stage.go_on("g1:1")))
    await settle()
    source.end(b"c")
    assert await newer == [b"id: g1:2\nb", b"id: g1:3\nc"]
    assert await reading == [b"id: g1:1\na"]


async def test_a_drop_before_the_first_event_ends_the_work_at_once() -> None:
    stage, source = Stage(), FakeSource()
    stage.begin(source).leave()
    assert source.is_closed
    assert (len(stage.recordings), stage.recordings.num_bytes) == (0, 0)


async def test_a_dropped_stream_is_ended_when_its_window_is_over() -> None:
    stage, source = Stage(), FakeSource([b"a", b"b"])
    await stage.drop_after_one(source)
    stage.clock.advance(WINDOW_S - 0.01)
    stage.recordings.expire()
    assert not source.is_closed
    stage.clock.advance(0.01)
    stage.recordings.expire()
    assert source.is_closed
    assert stage.recordings.go_on("g1:1", OURS) is Miss.NOTHING_LEFT
    assert (len(stage.recordings), stage.recordings.num_bytes) == (0, 0)


async def test_the_window_begins_anew_with_each_drop_and_does_not_end_what_is_read() -> None:
    stage, source = Stage(), FakeSource([b"a", b"b"])
    await stage.drop_after_one(source)
    stage.clock.advance(WINDOW_S - 1)
    again = stage.go_on("g1:1")
    stage.clock.advance(10 * WINDOW_S)
    stage.recordings.expire()
    assert await read(again, 1) == [b"id: g1:2\nb"]
    again.leave()
    stage.clock.advance(WINDOW_S - 1)
    stage.recordings.expire()
    assert not source.is_closed
    stage.clock.advance(1)
    stage.recordings.expire()
    assert source.is_closed


async def test_what_is_over_is_forgotten_after_the_window_too() -> None:
    stage, source = Stage(), FakeSource()
    source.end(b"a", b"b")
    reader = stage.begin(source)
    await read(reader)
    reader.leave()
    assert len(stage.recordings) == 1
    stage.clock.advance(WINDOW_S)
    stage.recordings.expire()
    assert (len(stage.recordings), stage.recordings.num_bytes) == (0, 0)


async def test_windows_are_watched_by_a_timer_of_the_event_loop() -> None:
    loop = asyncio.get_running_loop()
    recordings = Recordings(ReplayLimits(window_s=0.001), loop.time)
    source = FakeSource([b"a"])
    reader = recordings.begin(OURS, source, {})
    await read(reader, 1)
    reader.leave()
    async with asyncio.timeout(10):
        while not source.is_closed:  # noqa: ASYNC110 - the timer knows nothing of this test
            await asyncio.sleep(0)
    assert len(recordings) == 0


async def test_without_a_window_nothing_is_kept() -> None:
    stage, source = Stage(window_s=0), FakeSource([b"a", b"b"])
    await stage.drop_after_one(source)
    assert source.is_closed
    assert len(stage.recordings) == 0


async def test_a_long_stream_forgets_what_its_client_has_got_and_goes_on() -> None:
    stage, source = Stage(max_stream_bytes=10_000), FakeSource(*([b"x" * 100] for _ in range(1000)))
    source.is_ending = True
    reader = stage.begin(source)
    assert len(await read(reader, 500)) == 500
    assert stage.recordings.num_bytes <= 10_000 + 200
    reader.leave()

    assert stage.recordings.go_on("g1:10", OURS) is Miss.NOTHING_LEFT, "forgotten: not without a loss"
    assert len(await read(stage.go_on("g1:490"))) == 510


async def test_a_batch_larger_than_the_bound_is_given_whole() -> None:
    stage, source = Stage(max_stream_bytes=1), FakeSource()
    source.end(*(b"x" * 100 for _ in range(50)))
    assert len(await read(stage.begin(source))) == 50


async def test_in_all_first_goes_what_is_over_then_what_waits_longest_then_the_past_of_the_others() -> None:
    stage = Stage(max_bytes=12_000)
    over, paused, later = FakeSource(), FakeSource([b"p", b"p"]), FakeSource([b"q", b"q"])
    over.end(b"o", b"o")
    await stage.drop_after_one(paused)
    await stage.drop_after_one(later)
    done = stage.begin(over)
    await read(done)
    done.leave()
    assert len(stage.recordings) == 3

    source = FakeSource(*([b"x" * 1000] for _ in range(30)))
    reader = stage.begin(source)
    events = reader.events(never)
    for _ in range(4):
        await anext(events)
    assert stage.recordings.go_on("g3:1", OURS) is Miss.NOTHING_LEFT
    assert not paused.is_closed
    for _ in range(2):
        await anext(events)
    assert paused.is_closed
    assert not later.is_closed
    for _ in range(24):
        await anext(events)
        assert stage.recordings.num_bytes <= 12_000
    assert later.is_closed
    assert len(stage.recordings) == 1
    await events.aclose()
    reader.leave()
    stage.clock.advance(WINDOW_S)
    stage.recordings.expire()
    assert stage.recordings.num_bytes == 0


async def test_recordings_count_even_without_events() -> None:
    stage = Stage(max_bytes=20_000)
    for _ in range(100):
        await stage.drop_after_one()
    assert len(stage.recordings) < 10
    assert stage.recordings.num_bytes <= 20_000


async def test_so_many_are_paused_and_no_more() -> None:
    stage, sources = Stage(max_paused=2), [FakeSource([b"a", b"b"]) for _ in range(3)]
    for source in sources:
        await stage.drop_after_one(source)
    assert [source.is_closed for source in sources] == [True, False, False]
    assert stage.recordings.num_paused == 2


async def test_closing_ends_what_nobody_reads_and_lets_the_others_finish() -> None:
    stage, paused, source = Stage(), FakeSource([b"p", b"p"]), FakeSource([b"a"])
    await stage.drop_after_one(paused)
    reader = stage.begin(source)
    await read(reader, 1)
    stage.recordings.close()
    assert paused.is_closed
    assert not source.is_closed
    source.end(b"b")
    assert await read(reader) == [b"id: g2:2\nb"]
    reader.leave()
    assert (len(stage.recordings), stage.recordings.num_bytes) == (0, 0)


async def test_a_long_past_leaves_the_loop_to_others() -> None:
    stage, source = Stage(), FakeSource([b"a"] * 1000)
    reader = stage.begin(source)
    await read(reader, 1)
    given = 0
    most = 0

    async def all_events() -> None:
        nonlocal given
        events = reader.events(never)
        for _ in range(999):
            await anext(events)
            given += 1
        await events.aclose()

    reading = asyncio.ensure_future(all_events())
    while not reading.done():
        before = given
        await asyncio.sleep(0)
        most = max(most, given - before)
    assert 0 < most <= 64


async def test_events_may_be_joined_for_a_reader_that_is_slow() -> None:
    stage, source = Stage(), FakeSource([b"a"], [b"b"])
    source.is_ending = True
    answers = iter([False, True])
    assert len([event async for event in stage.begin(source).events(lambda: next(answers))]) == 2
    assert source.joins == [False, True]


async def settle() -> None:
    """Everybody who can run has run."""
    for _ in range(20):
        await asyncio.sleep(0)
