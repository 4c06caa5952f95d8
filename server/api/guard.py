"""Who may call: the API key, and the protection of a local server against web pages.

With a key everything but a few probes asks for it. Without one, generation is open to all (that is what a
local server is for), but routes that change the server refuse requests that a browser sent on behalf of a
page from elsewhere: such a page can send a POST without a preflight, and by rebinding its own name to
127.0.0.1 it can even look like the same origin. The first shows in `Origin`, the second in `Host`.

Neither depends on how a path is spelled: the protection against pages surrounds the endpoints themselves, and
the key is asked for everywhere but at a few paths that must be spelled exactly.
"""

import hmac
import ipaddress
import re
from urllib.parse import parse_qsl, urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.http import Endpoint, Exchange
from server.api.state import ApiOptions
from server.errors import Forbidden, RouteNotFound, Unauthorized

_OPEN_PATHS = frozenset(("/health", "/ready", "/ping"))
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_WILDCARDS = frozenset(("", "0.0.0.0", "::"))  # noqa: S104 - compared with, not bound


class Guard:
    """Refuses with 401 whoever does not bring the key, and with 404 paths that no honest client asks for."""

    def __init__(self, app: ASGIApp, options: ApiOptions) -> None:
        self._app = app
        self._key = None if options.api_key is None else options.api_key.encode("utf-8")
        self._open = _OPEN_PATHS | ({"/metrics"} if options.open_metrics else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            exchange = Exchange(scope, receive, send)
            if _CONTROLS.search(exchange.path):  # a route's pattern would match before a line end, too
                raise RouteNotFound("there is nothing at a path with control characters")
            if self._key is not None and scope["method"] != "OPTIONS" and exchange.path not in self._open:
                _check_key(exchange, self._key)
        await self._app(scope, receive, send)


def for_own_programs(endpoint: Endpoint, options: ApiOptions) -> Endpoint:
    """An endpoint that changes the server: without a key it is closed to pages from elsewhere."""
    if options.api_key is not None:
        return endpoint  # a page does not know the key

    async def closed_to_pages(exchange: Exchange) -> None:
        _check_page(exchange, options)
        await endpoint(exchange)

    return closed_to_pages


def _check_page(exchange: Exchange, options: ApiOptions) -> None:
    origin = exchange.header(b"origin")
    if origin is not None and not _is_own_origin(origin, options):
        raise Forbidden("a web page from elsewhere may not change this server; start it with --api-key")
    host = exchange.header(b"host")
    if host is not None and not _is_own_host(host, options):
        raise Forbidden(
            "the Host of this request is neither loopback nor --host; start the server with --api-key"
        )


def _is_own_origin(origin: str, options: ApiOptions) -> bool:
    if origin in options.allowed_origins and origin != "*":
        return True  # named by the operator
    try:
        return _is_own_host(urlsplit(origin).netloc, options)
    except ValueError:
        return False


def _is_own_host(netloc: str, options: ApiOptions) -> bool:
    try:
        name = urlsplit(f"//{netloc}").hostname
    except ValueError:
        return False
    if name is None:
        return False
    if name == options.host.lower() or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    # A server bound to all addresses is reached by any of them; a rebound name is never an address.
    return address.is_loopback or options.host in _WILDCARDS


def _check_key(exchange: Exchange, key: bytes) -> None:
    if not _brings_key(exchange, key):
        raise Unauthorized("this server asks for an API key: Authorization: Bearer KEY")


def _brings_key(exchange: Exchange, key: bytes) -> bool:
    """As a bearer, in X-API-Key, or as ?api_key= (EventSource cannot set headers). In constant time."""
    candidates: list[bytes] = []
    if (own := exchange.header(b"x-api-key")) is not None:
        candidates.append(own.encode("latin-1"))
    scheme, _, token = (exchange.header(b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer":
        candidates.append(token.strip().encode("latin-1"))
    query = parse_qsl(exchange.scope["query_string"].decode("latin-1"))
    candidates += [value.encode("utf-8") for name, value in query if name == "api_key"]
    # Each of them is compared, and in constant time: how long it takes says nothing about the key.
    return any([hmac.compare_digest(candidate, key) for candidate in candidates])  # noqa: C419 - all of them
