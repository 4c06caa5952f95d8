"""uvicorn as this server runs it.

httptools, because it costs least for each chunk; no websockets, no access log, no lifespan (the process has
its own); and two things of uvicorn's httptools protocol that are otherwise here:

* A body of unknown length is answered in chunks even to a client that speaks HTTP/1.0 and does not know them
  (`ab`, and what stands behind some proxies). Such a body ends with the connection instead (RFC 9112, section
  6.3).
* A chunk that can leave at once needs no message and no coroutine: `scope["motet.write"]` writes it, which
  takes a third of the time.
"""

from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


def make_config(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """The settings that every server of ours has; `more` are uvicorn's own."""
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        **more,
    )


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cast(Scope, cycle.scope)["motet.write"] = partial(_write_chunk, cycle)
        is_old = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, _ended_by_closing(app, cycle) if is_old else app)


def _write_chunk(cycle: RequestResponseCycle, body: bytes) -> bool:
    """Write a part of a body that is not the last one. False: nothing was done, for the head was not sent or
    the end was, or the client has to be waited for, or has gone, or gets no chunks; or the part is empty, as
    the chunk that ends a body is.
    """
    is_open = cycle.chunked_encoding and not cycle.response_complete and not cycle.disconnected
    if not is_open or not body or cycle.flow.write_paused:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True


def _ended_by_closing(app: ASGIApp, cycle: RequestResponseCycle) -> Any:
    """The app, with bodies of unknown length sent as they are: uvicorn closes such a connection anyway."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_unknown = False

        async def send_unframed(message: Message) -> None:
            nonlocal is_unknown
            if message["type"] == "http.response.start":
                is_unknown = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                if is_unknown:
                    cycle.chunked_encoding = False  # decided: uvicorn announces nothing
            elif is_unknown:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_unframed)

    return answer
