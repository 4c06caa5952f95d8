"""A part of a body that is written past ASGI is a chunk as any other, and nothing is where it may not be."""

from starlette.types import Receive, Scope, Send

from server.api.http import Exchange
from tests.server.api.conftest import serve
from tests.server.api.raw_http import Connection, ask, get


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers in both ways by turns, and notes in its last part what could be done when."""
    exchange = Exchange(scope, receive, send)
    write, done = exchange.write_now, []
    done.append(write(b"before the head"))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    done.append(write(b"first"))
    await send({"type": "http.response.body", "body": b"second", "more_body": True})
    done.append(write(b""))
    done.append(write(b"third"))
    await send({"type": "http.response.body", "body": repr(done).encode(), "more_body": False})
    assert not write(b"after the end")


async def test_parts_come_whole_and_in_order_and_none_is_out_of_place() -> None:
    async with serve(_app) as port:
        answer = await ask(port, get("/"))

    assert answer.chunks == [b"first", b"second", b"third", b"[False, True, False, True]"]


async def test_a_connection_is_kept_for_the_next_request() -> None:
    async with serve(_app) as port:
        connection = await Connection.open(port)
        for _ in range(2):
            await connection.send(get("/"))
            assert len((await connection.read_answer()).chunks) == 4
        connection.drop()


async def test_a_body_of_known_length_is_not_cut_into_chunks() -> None:
    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"3")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        written = Exchange(scope, receive, send).write_now(b"one")
        await send({"type": "http.response.body", "body": b"two" if written else b"all"})

    async with serve(whole) as port:
        answer = await ask(port, get("/"))

    assert answer.body == b"all"
