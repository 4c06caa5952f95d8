"""EventSource over a real port: connections that drop, come back, and are told when there is nothing more.

Rows J7 to J10, D7, D8, D16, D19, T12.
"""

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.app import build_app
from server.api.replay import Recordings, ReplayLimits
from server.api.state import Phase, ServerState
from server.types import FinishReason, TokenEvent
from tests.fakes import FakeClock
from tests.server.api.conftest import serve
from tests.server.api.fake_service import FakeService, FakeStream, finish_of, token_event, words
from tests.server.api.raw_http import Connection, RawAnswer, ask, get, post, until

MakeState = Callable[..., ServerState]

PATH = "/api/jobs/base/infer/stream?prompt=Hi"
WINDOW_S = 30.0


@dataclass
class EventSource:
    """Reads as browsers do: an event counts when its blank line is there, and its id is remembered then."""

    last_id: str = ""
    retry_ms: int | None = None
    messages: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    _rest: bytes = b""

    @property
    def text(self) -> str:
        """Of the tokens."""
        return "".join(json.loads(message)["token"] for message in self.messages if message != "[DONE]")

    def feed(self, received: bytes) -> None:
        *blocks, self._rest = (self._rest + received).split(b"\n\n")
        for block in blocks:
            self._dispatch(block.decode("ascii"))

    def _dispatch(self, block: str) -> None:
        data = None
        for line in block.split("\n"):
            name, _, value = line.partition(": ")
            if name == "id":
                self.last_id = value
            elif name == "retry":
                self.retry_ms = int(value)
            elif name == "data":
                data = value
        if data is not None:
            self.messages.append(data)
            self.ids.append(self.last_id)

    def lost(self) -> None:
        """The connection dropped: what has no blank line yet is forgotten."""
        self._rest = b""

    def request(self, path: str = PATH) -> bytes:
        again = (f"Last-Event-ID: {self.last_id}",) if self.last_id else ()
        return get(path, "Accept: text/event-stream", "Cache-Control: no-store", *again)


async def connect(port: int, source: EventSource, path: str = PATH) -> tuple[Connection, RawAnswer]:
    connection = await Connection.open(port)
    await connection.send(source.request(path))
    return connection, await connection.read_head()


async def begin(
    port: int, service: FakeService, source: EventSource, path: str = PATH
) -> tuple[Connection, FakeStream]:
    """A generation with its first token."""
    connection = await Connection.open(port)
    await connection.send(source.request(path))
    stream = await asyncio.wait_for(service.streams.get(), 10)
    stream.put(token_event("a"))
    assert (await connection.read_head()).status == 200
    source.feed(await connection.read_chunk())
    return connection, stream


async def read_rest(connection: Connection, source: EventSource) -> None:
    while chunk := await connection.read_chunk():
        source.feed(chunk)
    connection.drop()


async def drop(connection: Connection, stream: FakeStream, source: EventSource) -> None:
    """Kill the connection and wait until the server knows."""
    connection.drop()
    source.lost()
    await until(lambda: stream.is_paused)


def last(stream: FakeStream, text: str) -> TokenEvent:
    return token_event(text, finish=finish_of(stream.request, "", 1))


async def test_J9_dropped_stream_goes_on_where_its_client_was(port: int, manual: FakeService) -> None:
    """Several times over; ids are without a gap, tokens neither lost nor repeated, the model runs once."""
    source = EventSource()
    connection, stream = await begin(port, manual, source)
    for pair in ("bc", "de", "fg"):
        stream.put(token_event(pair[0]))
        source.feed(await connection.read_chunk())
        await drop(connection, stream, source)
        stream.put(token_event(pair[1]))  # was under way in the engine
        connection, answer = await connect(port, source)
        assert answer.status == 200
        assert answer.header("cache-control") == "no-store, no-transform"
        source.feed(await connection.read_chunk())
        assert not stream.is_paused
    stream.put(last(stream, "h"))
    await read_rest(connection, source)

    assert source.text == "abcdefgh"
    assert source.messages[-1] == "[DONE]"
    assert source.ids == [f"gen1:{n}" for n in range(1, 10)]
    assert source.retry_ms == 2000
    assert len(manual.requests) == 1
    assert manual.is_idle


async def test_J9_events_that_the_server_sent_but_the_client_never_got_come_again(
    port: int, manual: FakeService
) -> None:
    """Also those that the client got half of."""
    source = EventSource()
    connection, stream = await begin(port, manual, source)
    for text in "bcd":
        stream.put(token_event(text))
        chunk = await connection.read_chunk()
        source.feed(chunk if text == "b" else chunk[:-1] if text == "c" else b"")
    await drop(connection, stream, source)
    connection, _ = await connect(port, source)
    stream.put(last(stream, "e"))
    await read_rest(connection, source)

    assert source.text == "abcde"
    assert source.ids == [f"gen1:{n}" for n in range(1, 7)]


async def test_J8_client_that_has_seen_the_end_is_told_to_stop(port: int, service: FakeService) -> None:
    """T12: EventSource comes back after an orderly end, too."""
    source = EventSource()
    connection, _ = await connect(port, source)
    await read_rest(connection, source)
    answer = await ask(port, source.request())

    assert source.messages[-1] == "[DONE]"
    assert answer.status == 204
    assert answer.header("content-length") is None
    assert answer.header("cache-control") == "no-store, no-transform"
    assert len(service.requests) == 1


async def test_client_that_lost_the_end_gets_it_after_the_generation_is_over(
    port: int, service: FakeService
) -> None:
    service.script = words("a", "b", "c")
    whole = EventSource()
    connection, _ = await connect(port, whole)
    await read_rest(connection, whole)
    for seen in (1, 2, 3):
        source = EventSource(last_id=f"gen1:{seen}")
        connection, answer = await connect(port, source)
        await read_rest(connection, source)
        assert answer.header("x-prompt-tokens") == "3"
        assert source.messages == whole.messages[seen:]
        assert source.ids == whole.ids[seen:]
    assert len(service.requests) == 1


async def test_J9_after_the_window_the_answer_is_204_and_the_work_is_ended(
    state: ServerState, manual: FakeService
) -> None:
    clock = FakeClock()
    state.recordings = Recordings(ReplayLimits(window_s=WINDOW_S), clock)
    async with serve(build_app(state)) as port:
        source = EventSource()
        connection, stream = await begin(port, manual, source)
        await drop(connection, stream, source)
        clock.advance(WINDOW_S - 1)
        state.recordings.expire()
        assert not stream.is_closed
        clock.advance(1)
        state.recordings.expire()
        assert stream.is_closed
        assert (await ask(port, source.request())).status == 204
    assert len(manual.requests) == 1
    assert manual.is_idle


async def test_unknown_generation_is_204(port: int, service: FakeService) -> None:
    """A restarted server must not answer a question that was asked before, from its beginning."""
    for unknown in ("gen9:3", "something else", "gen1"):
        assert (await ask(port, get(PATH, f"Last-Event-ID: {unknown}"))).status == 204
    assert service.requests == []


@pytest.mark.parametrize("name", ["lastEventId", "last_event_id"])
async def test_last_event_may_be_named_in_the_query(port: int, service: FakeService, name: str) -> None:
    """Polyfills; the header, if there is one, is newer."""
    service.script = words("a", "b")
    await ask(port, get(PATH))
    by_query = await ask(port, get(f"{PATH}&{name}=gen1%3A2"))
    by_both = await ask(port, get(f"{PATH}&{name}=gen1:1", "Last-Event-ID: gen1:2"))
    ended = await ask(port, get(f"{PATH}&{name}=gen1:3"))
    anew = await ask(port, get(f"{PATH}&{name}=", "Last-Event-ID: "))

    assert by_query.body == b"id: gen1:3\ndata: [DONE]\n\n"
    assert by_both.body == by_query.body
    assert ended.status == 204
    assert anew.body.startswith(b"id: gen2:1\n")
    assert len(service.requests) == 2


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (PATH.replace("base", "pirate"), ()),
        (PATH.replace("Hi", "Ho"), ()),
        (f"{PATH}&temperature=0", ()),
        (f"{PATH}&max_new_tokens=9", ()),
        (f"{PATH}&seed=1", ()),
        (PATH, ("X-API-Key: other",)),
        (PATH, ("Authorization: Bearer other",)),
        (f"{PATH}&api_key=other", ()),
    ],
)
async def test_event_of_another_job_prompt_parameter_or_key_begins_a_new_generation(
    port: int, manual: FakeService, path: str, headers: tuple[str, ...]
) -> None:
    manual.registry.add("pirate")
    source = EventSource()
    connection, stream = await begin(port, manual, source)
    await drop(connection, stream, source)

    other = await Connection.open(port)
    await other.send(get(path, f"Last-Event-ID: {source.last_id}", *headers))
    anew = await asyncio.wait_for(manual.streams.get(), 10)
    anew.put(token_event("x"))
    assert (await other.read_head()).status == 200
    assert (await other.read_chunk()).startswith(b"id: gen2:1\n")
    assert stream.is_paused, "and the one that was named is not touched"
    other.drop()


async def test_the_same_request_by_another_method_goes_on_too(port: int, manual: FakeService) -> None:
    """fetch-based EventSources post, and name the event in the header as well."""
    source = EventSource()
    connection, stream = await begin(port, manual, source)
    await drop(connection, stream, source)
    connection = await Connection.open(port)
    path, _, _ = PATH.partition("?")
    await connection.send(post(path, {"prompt": "Hi"}, f"Last-Event-ID: {source.last_id}"))
    assert (await connection.read_head()).status == 200
    stream.put(last(stream, "b"))
    await read_rest(connection, source)

    assert source.text == "ab"
    assert len(manual.requests) == 1


async def test_of_two_readers_the_newer_gets_the_rest_and_the_older_ends(
    port: int, manual: FakeService
) -> None:
    """A link can die without the server noticing."""
    source = EventSource()
    older, stream = await begin(port, manual, source)
    newer, answer = await connect(port, source)
    assert answer.status == 200
    assert await older.read_chunk() == b"", "the body ends properly, without [DONE]"
    assert not stream.is_paused
    stream.put(last(stream, "b"))
    await read_rest(newer, source)

    assert source.text == "ab"
    assert manual.is_idle
    older.drop()


@pytest.mark.parametrize("deadline_s", [10.0, 0.001])
async def test_drop_before_the_first_event_ends_the_work_at_once(
    make_state: MakeState, manual: FakeService, deadline_s: float
) -> None:
    """D7: with the head held, and with the head sent at the deadline."""
    async with serve(build_app(make_state(header_deadline_s=deadline_s))) as port:
        connection = await Connection.open(port)
        await connection.send(get(PATH))
        stream = await asyncio.wait_for(manual.streams.get(), 10)
        if deadline_s < 1:
            await connection.read_head()
        connection.drop()
        await asyncio.wait_for(stream.closed.wait(), 10)
        assert stream.num_pauses == 0
    assert manual.is_idle


async def test_J9_failure_while_nobody_reads_is_told_to_whoever_comes_back(
    port: int, manual: FakeService
) -> None:
    """An error event and [DONE], with ids; after that 204."""
    source = EventSource()
    connection, stream = await begin(port, manual, source)
    await drop(connection, stream, source)
    finish = finish_of(stream.request, "a", 1, reason=FinishReason.ERROR, error="out of luck")
    stream.put(TokenEvent(0, "", None, finish))
    connection, _ = await connect(port, source)
    await read_rest(connection, source)

    assert source.messages[1:] == ['{"error": "out of luck"}', "[DONE]"]
    assert source.ids == ["gen1:1", "gen1:2", "gen1:3"]
    assert (await ask(port, source.request())).status == 204
    assert manual.is_idle


async def test_D8_client_that_stops_reading_is_cut_off_and_may_come_back(
    make_state: MakeState, manual: FakeService
) -> None:
    roomy = ReplayLimits(max_stream_bytes=2**30, max_bytes=2**30)
    state = make_state(send_timeout_s=0.05, replay=roomy)
    async with serve(build_app(state)) as port:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(get(PATH))
        stream = await asyncio.wait_for(manual.streams.get(), 10)
        stream.put(token_event("a"))
        text = ""
        async with asyncio.timeout(20):
            while not stream.is_paused:
                text += "x" * 60_000
                stream.put(token_event("x" * 60_000))
                await asyncio.sleep(0)
        client.close()

        state.options = replace(state.options, send_timeout_s=30)  # the next one reads
        source = EventSource(last_id="gen1:1")
        connection, _ = await connect(port, source)
        stream.put(last(stream, "!"))
        await read_rest(connection, source)
    assert source.text == text + "!"
    assert manual.is_idle


async def test_slow_client_gets_tokens_joined_and_none_lost(port: int, manual: FakeService) -> None:
    """One event for several tokens only while the transport is full; the text is the same."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, get(PATH))
    stream = await asyncio.wait_for(manual.streams.get(), 10)
    texts = [f"{n:05d}".ljust(4000, ".") for n in range(1500)]
    for text in texts:
        stream.put(token_event(text))
        await asyncio.sleep(0)
    stream.put(last(stream, "!"))
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        received += await asyncio.wait_for(loop.sock_recv(client, 1 << 20), 10)
    client.close()
    source = EventSource()
    for chunk in received.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2]:
        source.feed(chunk)

    assert source.text == "".join(texts) + "!"
    assert len(source.messages) < len(texts)
    assert source.ids == [f"gen1:{n}" for n in range(1, len(source.ids) + 1)]


async def test_while_the_server_drains_a_stream_may_be_gone_on_with_but_none_begun(
    state: ServerState, port: int, manual: FakeService
) -> None:
    source = EventSource()
    connection, stream = await begin(port, manual, source)
    await drop(connection, stream, source)
    state.phase = Phase.DRAINING
    assert (await ask(port, get(PATH))).status == 503
    connection, answer = await connect(port, source)
    assert answer.status == 200
    stream.put(last(stream, "b"))
    await read_rest(connection, source)

    assert source.text == "ab"


async def test_streams_that_nobody_reads_end_with_the_server(
    state: ServerState, port: int, manual: FakeService
) -> None:
    source = EventSource()
    connection, stream = await begin(port, manual, source)
    await drop(connection, stream, source)
    state.recordings.close()
    assert stream.is_closed
    assert manual.is_idle


async def test_stream_ends_right_after_done(port: int, manual: FakeService) -> None:
    """J1, D16."""
    source = EventSource()
    connection, stream = await begin(port, manual, source)
    stream.put(last(stream, "b"))
    chunks = [await connection.read_chunk() for _ in range(3)]

    assert chunks == [b'id: gen1:2\ndata: {"token": "b"}\n\n', b"id: gen1:3\ndata: [DONE]\n\n", b""]
    assert manual.is_idle
    connection.drop()


async def test_silence_carries_comments_and_they_have_no_ids(
    make_state: MakeState, manual: FakeService
) -> None:
    """J7: no gap that a client's timeout would notice."""
    async with serve(build_app(make_state(keep_alive_s=0.01))) as port:
        source = EventSource()
        connection, stream = await begin(port, manual, source)
        assert await connection.read_chunk() == b": keep-alive\n\n"
        await drop(connection, stream, source)
        connection, _ = await connect(port, source)
        assert await connection.read_chunk() == b": keep-alive\n\n"
        stream.put(last(stream, "b"))
        await read_rest(connection, source)
    assert source.text == "ab"


async def test_J7_reflex_reads_lines_with_httpx(port: int, service: FakeService) -> None:
    """T6: characters at which httpx ends a line; the prompt has them too."""
    text = ("one\u2028", "two\u2029\x85", "\r\n\v\f\x1c", "\u732b\U0001f600", '"\\')
    service.script = words(*text)
    tokens: list[str] = []
    params: dict[str, Any] = {
        "prompt": "[System: be\u2028kind] Hi",
        "max_new_tokens": 300,
        "temperature": 0.7,
    }
    async with httpx.AsyncClient(timeout=180) as client:
        url = f"http://127.0.0.1:{port}/api/jobs/base/infer/stream"
        async with client.stream("GET", url, params=params) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    tokens.append(json.loads(line[6:])["token"])

    assert tuple(tokens) == text


async def test_J9_key_that_may_no_longer_use_the_job_cannot_go_on_with_it(
    make_state: MakeState, manual: FakeService, tmp_path: Path
) -> None:
    manual.registry.add("pirate")
    file, now = tmp_path / "keys", [100.0]
    file.write_text("sk-one adapters=pirate\n")
    state = make_state(api_keys_file=file)
    state.clock = lambda: now[0]
    path = f"{PATH.replace('base', 'pirate')}&api_key=sk-one"
    async with serve(build_app(state)) as port:
        source = EventSource()
        connection, _ = await begin(port, manual, source, path)
        file.write_text("sk-one adapters=other\n")
        now[0] += 1
        again, refused = await connect(port, source, path)

        assert refused.status == 404
        again.drop()
        connection.drop()
