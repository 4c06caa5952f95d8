"""Streams that outlive their connections.

    begin ──> read ── its reader leaves ──> paused ── window is over ──> forgotten, its work ended
               │ ^                            │                              ^
               │ └────────── go_on ───────────┤                              │
               └─ ends ──> over ──────────────┴─────── window is over ───────┘

A `Recording` is one generation: its events so far, numbered from 1, and the source of the rest. It has one
reader at most, and the newest wins. Nothing runs here by itself: a reader takes events from the source when
it has none left, so a recording that nobody reads costs memory and nothing else, and its source is paused.

Event n of recording g begins with the line `id: g:n`. Whoever names it may go on after it, if the same
request is made with the same key; both are kept as one digest. What is kept has three bounds: the size of a
recording, beyond which it forgets its past; the size of all of them, where first goes what is over, then
what was left longest ago, then the past of what is being read; and the number of those that are paused.
"""

import asyncio
import re
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import blake2b
from typing import Protocol

from adapters.types import Clock

_EVENT_ID = re.compile(r"([A-Za-z0-9_-]{1,64}):([1-9][0-9]{0,8})")
_OWN_BYTES = 2048  # of a recording without events
_EVENT_BYTES = 48  # of an event, beside its text
_SLICE = 64  # events that are handed out before the event loop gets its turn


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """How long and how much is kept."""

    window_s: float = 30.0  # how long a stream waits for its client to come back; 0: not at all
    max_stream_bytes: int = 2**20
    max_bytes: int = 64 * 2**20
    max_paused: int = 256


class Source(Protocol):
    """Where the events of a recording come from."""

    @property
    def is_over(self) -> bool: ...

    async def take(self, *, join: bool) -> list[bytes]:
        """The next events, without ids. Cancelling it loses nothing."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None:
        """End the work. Synchronous and idempotent."""
        ...


class Miss(Enum):
    """Why there is nothing to go on with."""

    FOREIGN = auto()  # the event belongs to another request, or to the holder of another key
    NOTHING_LEFT = auto()  # it was the last one, or its recording is forgotten, or there never was one


class Reader:
    """One connection's place in a recording."""

    __slots__ = ("_recording", "last", "wait")

    def __init__(self, recording: "Recording", last: int) -> None:
        self._recording = recording
        self.last = last  # number of the last event that it was given
        self.wait: asyncio.Timeout | None = None  # while it waits for the source: how to end that

    @property
    def headers(self) -> Mapping[str, str]:
        """Of the answer that the recording began with."""
        return self._recording.headers

    async def events(self, is_blocked: Callable[[], bool]) -> AsyncGenerator[bytes, None]:
        """All events after `last` as they come, up to the end or until a newer reader comes.

        `is_blocked`: the client reads slowly, so events that lose nothing by it may become one.
        """
        recording = self._recording
        while recording.reader is self:
            if self.last < recording.num_events:
                self.last += 1
                yield recording.event(self.last)
                if self.last % _SLICE == 0:
                    await asyncio.sleep(0)  # a long past is not written in one go
            elif recording.is_over:
                return
            else:
                await recording.take(self, join=is_blocked())

    def leave(self) -> None:
        """The connection has ended, however it did. Synchronous and idempotent."""
        self._recording.leave(self)


class Recording:
    """One generation's events, and where the next ones come from."""

    __slots__ = (
        "_events",
        "_recordings",
        "_source",
        "_taking",
        "headers",
        "id",
        "left_at",
        "num_bytes",
        "num_events",
        "reader",
        "whose",
    )

    def __init__(
        self, recordings: "Recordings", id: str, whose: bytes, source: Source, headers: Mapping[str, str]
    ) -> None:
        self.id = id
        self.whose = whose  # a fingerprint
        self.headers = headers
        self.reader: Reader | None = None
        self.left_at = 0.0  # clock seconds since which nobody reads it
        self.num_bytes = _OWN_BYTES
        self.num_events = 0  # also those that are forgotten
        self._events: deque[bytes] = deque()  # the newest ones
        self._recordings = recordings
        self._source: Source | None = source  # None: over
        self._taking = asyncio.Lock()  # one reader at a time takes from a source

    @property
    def is_over(self) -> bool:
        return self._source is None

    @property
    def num_forgotten(self) -> int:
        return self.num_events - len(self._events)

    def goes_on_after(self, number: int) -> bool:
        """Whether something follows this event, and all of it can be had."""
        is_last = self.is_over and number == self.num_events
        return self.num_forgotten <= number <= self.num_events and not is_last

    def event(self, number: int) -> bytes:
        """One that has come and is not forgotten."""
        return self._events[number - self.num_forgotten - 1]

    def read_after(self, number: int) -> Reader:
        """A reader that gets what follows this event; the reader before gets no more."""
        before, self.reader = self.reader, Reader(self, number)
        if before is not None and before.wait is not None:
            before.wait.reschedule(0.0)  # in the past: it is over at once
        if self._source is not None:
            self._source.resume()
        return self.reader

    async def take(self, reader: Reader, *, join: bool) -> None:
        """Record what comes next; nothing if a newer reader comes first."""
        async with self._taking:  # the reader before may still be on its way out
            if self._source is None or self.reader is not reader:
                return
            try:
                async with asyncio.timeout(None) as reader.wait:
                    events = await self._source.take(join=join)
            except TimeoutError:
                return
            finally:
                reader.wait = None
            if self._source is None:
                return  # forgotten meanwhile
            for event in events:
                self._record(event)
            if self._source.is_over:
                self._source = None  # and with it all that only the work needed
        self._recordings.make_room(self)

    def leave(self, reader: Reader) -> None:
        """Nobody reads any more, unless a newer reader has come."""
        if self.reader is not reader:
            return
        self.reader = None
        if self._recordings.keep_unread(self, is_known=reader.last > 0) and self._source is not None:
            self._source.pause()

    def forget_past(self, most_bytes: int) -> int:
        """Forget what its reader has been given, oldest first, down to this size. Returns the bytes freed."""
        before = self.num_bytes
        num_given = 0 if self.reader is None else self.reader.last
        while self.num_bytes > most_bytes and self.num_forgotten < num_given:
            self.num_bytes -= len(self._events.popleft()) + _EVENT_BYTES
        return before - self.num_bytes

    def end(self) -> None:
        """Whatever still runs of it."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _record(self, event: bytes) -> None:
        self.num_events += 1
        event = f"id: {self.id}:{self.num_events}\n".encode("ascii") + event
        self._events.append(event)
        self.num_bytes += len(event) + _EVENT_BYTES
        self._recordings.num_bytes += len(event) + _EVENT_BYTES


def _new_id() -> str:
    return secrets.token_urlsafe(16)


class Recordings:
    """All recordings of a server. Used on the event loop alone."""

    def __init__(self, limits: ReplayLimits, clock: Clock, new_id: Callable[[], str] = _new_id) -> None:
        """`new_id` gives ids that nobody can guess, of letters, digits, dashes and underscores."""
        self.num_bytes = 0
        self._limits = limits
        self._clock = clock
        self._new_id = new_id
        self._salt = secrets.token_bytes(16)
        self._all: dict[str, Recording] = {}
        self._paused: dict[str, Recording] = {}  # in the order in which they were left, as `_over` is
        self._over: dict[str, Recording] = {}  # and read by nobody
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def num_paused(self) -> int:
        return len(self._paused)

    def __len__(self) -> int:
        return len(self._all)

    def fingerprint(self, *parts: bytes | str | float | None) -> bytes:
        """A digest by which two requests can be told to be the same, and nothing else be learnt."""
        return blake2b(repr(parts).encode("utf-8", "surrogatepass"), key=self._salt, digest_size=16).digest()

    def begin(self, whose: bytes, source: Source, headers: Mapping[str, str]) -> Reader:
        """A new recording, read from its beginning."""
        recording = Recording(self, self._new_id(), whose, source, headers)
        self._all[recording.id] = recording
        self.num_bytes += recording.num_bytes
        self.make_room(recording)
        return recording.read_after(0)

    def go_on(self, event_id: str, whose: bytes) -> Reader | Miss:
        """Read on after an event, which a client has named; any other reader gets no more."""
        match = _EVENT_ID.fullmatch(event_id)
        recording = self._all.get(match[1]) if match else None
        if match is None or recording is None:
            return Miss.NOTHING_LEFT
        if recording.whose != whose:
            return Miss.FOREIGN
        number = int(match[2])
        if not recording.goes_on_after(number):
            return Miss.NOTHING_LEFT
        self._paused.pop(recording.id, None)
        self._over.pop(recording.id, None)
        return recording.read_after(number)

    def keep_unread(self, recording: Recording, *, is_known: bool) -> bool:
        """Keep it for the window, if there is one. Returns whether it is kept.

        Without an event that its client knows it cannot be gone on with.
        """
        if not is_known or self._is_closed or self._limits.window_s <= 0:
            self._forget(recording)
            return False
        recording.left_at = self._clock()
        unread = self._over if recording.is_over else self._paused
        unread[recording.id] = recording
        if len(self._paused) > self._limits.max_paused:
            self._forget(_first(self._paused))
        self._set_timer()
        return True

    def make_room(self, grown: Recording) -> None:
        """Within the bounds again, after one has grown."""
        self.num_bytes -= grown.forget_past(self._limits.max_stream_bytes)
        while self.num_bytes > self._limits.max_bytes and (unread := self._over or self._paused):
            self._forget(_first(unread))
        if self.num_bytes > self._limits.max_bytes:
            largest = max(self._all.values(), key=lambda recording: recording.num_bytes)
            self.num_bytes -= largest.forget_past(0)

    def expire(self) -> None:
        """Forget what nobody has come back to in time."""
        for unread in (self._over, self._paused):
            while unread and self._due(_first(unread)) <= self._clock():
                self._forget(_first(unread))
        self._set_timer()

    def close(self) -> None:
        """Forget what nobody reads, and from now on whatever is left. Readers go on to the end."""
        self._is_closed = True
        for recording in [*self._over.values(), *self._paused.values()]:
            self._forget(recording)
        self._set_timer()

    def _due(self, recording: Recording) -> float:
        return recording.left_at + self._limits.window_s

    def _forget(self, recording: Recording) -> None:
        for recordings in (self._all, self._paused, self._over):
            recordings.pop(recording.id, None)
        self.num_bytes -= recording.num_bytes
        recording.end()

    def _set_timer(self) -> None:
        """For the first one that is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = [self._due(_first(unread)) for unread in (self._over, self._paused) if unread]
        if due:
            wait_s = max(min(due) - self._clock(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.expire)


def _first(recordings: Mapping[str, Recording]) -> Recording:
    return next(iter(recordings.values()))
