"""The pages that the server has for people: single files without outside requests.

A page's script and style stand in it and are allowed by their digests, and nothing else may run, be loaded,
or be asked but this server. A script may be written in several files, which are put together in the order of
their names, after those that pages have in common. Nothing in a page is secret: what it shows it asks for,
with the visitor's key.
"""

import asyncio
import base64
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from server.api.http import Endpoint, Exchange

NO_CACHE = (b"cache-control", b"no-cache")
_HTML = b"text/html; charset=utf-8"
_VARY = (b"vary", b"Accept")
_STYLE, _SCRIPT = "/* style */", "/* script */"


@dataclass(frozen=True, slots=True)
class Page:
    body: bytes
    policy: str  # the Content-Security-Policy under which it works

    async def send(self, exchange: Exchange, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        protection = [
            NO_CACHE,
            (b"content-security-policy", self.policy.encode("ascii")),
            (b"referrer-policy", b"no-referrer"),  # the address of a page may hold a key
            (b"x-content-type-options", b"nosniff"),
        ]
        await exchange.answer(self.body, content_type=_HTML, headers=[*protection, *headers])


@functools.cache
def page(name: str) -> Page:
    """From the folders `server/web/common` and `server/web/NAME`."""
    web = files("server") / "web"
    (html,), style, script = (_read(web / name, suffix) for suffix in (".html", ".css", ".js"))
    together = {_STYLE: "\n".join(style), _SCRIPT: "\n".join([*_read(web / "common", ".js"), *script])}
    for mark, text in together.items():
        assert html.count(mark) == 1
        html = html.replace(mark, text)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_digest(together[_SCRIPT])}",
            f"style-src {_digest(together[_STYLE])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )
    return Page(html.encode("utf-8"), policy)


def page_endpoint(name: str) -> Endpoint:
    """`GET` of a page."""

    async def endpoint(exchange: Exchange) -> None:
        await (await asyncio.to_thread(page, name)).send(exchange)

    return endpoint


def page_or(name: str, otherwise: Endpoint) -> Endpoint:
    """The page for whoever can show it, the other answer for programs."""

    async def endpoint(exchange: Exchange) -> None:
        if "text/html" in (exchange.header(b"accept") or ""):
            await (await asyncio.to_thread(page, name)).send(exchange, [_VARY])
        else:
            await otherwise(exchange)

    return endpoint


def _read(folder: Traversable, suffix: str) -> list[str]:
    found = sorted(file.name for file in folder.iterdir() if file.name.endswith(suffix))
    return [(folder / name).read_text("utf-8") for name in found]


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
