"""uvicorn as this server runs it.

httptools, because it costs least for each chunk; no websockets, no access log, no lifespan (the process has
its own); and one thing that uvicorn's httptools protocol gets wrong: a body of unknown length is answered in
chunks even to a client that speaks HTTP/1.0 and does not know them (`ab`, and what stands behind some
proxies). Such a body ends with the connection instead (RFC 9112, section 6.3).
"""

from typing import Any

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
        is_old = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, _ended_by_closing(app, cycle) if is_old else app)


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
