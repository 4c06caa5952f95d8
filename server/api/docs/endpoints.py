"""`/openapi.json` and `/docs`. Both answer in every phase; what they say is made once, when it is first asked
for.

The page is one file without outside requests: its script and its style stand in it and are allowed by their
digests, and nothing else may run, be loaded, or be asked but this server.
"""

import asyncio
import base64
import functools
import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files

from starlette.routing import Route

from server.api.docs.document import Table, document
from server.api.docs.operations import Chapter
from server.api.http import Endpoint, Exchange, Resource
from server.api.shapes import to_json
from server.api.state import ServerState

_NO_CACHE = (b"cache-control", b"no-cache")
_HTML = b"text/html; charset=utf-8"


def table_of(routes: Sequence[Route]) -> Table:
    """Paths and methods of the routes."""
    table: list[tuple[str, tuple[str, ...]]] = []
    for route in routes:
        assert isinstance(route.endpoint, Resource), f"{route.path} is no Resource"
        table.append((route.path, route.endpoint.methods))
    return table


def document_endpoint(
    state: ServerState, table: Callable[[], Table], chapters: Sequence[Chapter]
) -> Endpoint:
    """`GET /openapi.json`"""

    def write() -> bytes:
        asks_for_key = state.options.asks_for_key
        return to_json(document(table(), chapters, version=state.version, asks_for_key=asks_for_key))

    made = functools.cache(write)

    async def endpoint(exchange: Exchange) -> None:
        await exchange.answer(await asyncio.to_thread(made), headers=[_NO_CACHE])

    return endpoint


def page_endpoint() -> Endpoint:
    """`GET /docs`"""
    made = functools.cache(page)

    async def endpoint(exchange: Exchange) -> None:
        body, policy = await asyncio.to_thread(made)
        headers = [
            _NO_CACHE,
            (b"content-security-policy", policy.encode("ascii")),
            (b"referrer-policy", b"no-referrer"),  # the address of the page may hold a key
            (b"x-content-type-options", b"nosniff"),
        ]
        await exchange.answer(body, content_type=_HTML, headers=headers)

    return endpoint


def page() -> tuple[bytes, str]:
    """The page and the Content-Security-Policy under which it works."""
    folder = files("server") / "web"
    style, script = ((folder / name).read_text("utf-8") for name in ("docs.css", "docs.js"))
    html = (folder / "docs.html").read_text("utf-8")
    body = html.replace("/* docs.css */", style).replace("/* docs.js */", script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_digest(script)}",
            f"style-src {_digest(style)}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )
    return body.encode("utf-8"), policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
