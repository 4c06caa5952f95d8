"""Who may call: the API keys, and the protection of a local server against web pages.

With keys everything but a few probes asks for one, and routes that change the server ask for one of an admin.
Without, generation is open to all (that is what a local server is for), but routes that change the server
refuse requests that a browser sent on behalf of a page from elsewhere: such a page can send a POST without a
preflight, and by rebinding its own name to 127.0.0.1 it can even look like the same origin. The first shows
in `Origin`, the second in `Host`.

Neither depends on how a path is spelled: the protection against pages surrounds the endpoints themselves, and
the key is asked for everywhere but at a few paths that must be spelled exactly.
"""

import ipaddress
import re
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.caller import NOBODY, Caller, anyone
from server.api.http import CALLER, Endpoint, Exchange
from server.api.keys import KeyRing
from server.api.state import ApiOptions
from server.errors import Forbidden, RouteNotFound, Unauthorized

_OPEN_PATHS = frozenset(("/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"))
_PAGES = frozenset(("/", "/playground", "/docs"))  # to be read by everybody: what they show they ask for
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MOST_CANDIDATES = 4  # each is compared with every key
_WILDCARDS = frozenset(("", "0.0.0.0", "::"))  # noqa: S104 - compared with, not bound


class Guard:
    """Says whose request it is. Refuses with 401 whoever does not bring a key, and with 404 paths that no
    honest client asks for.
    """

    def __init__(self, app: ASGIApp, options: ApiOptions, keys: KeyRing | None) -> None:
        """`keys`: None lets everybody in, whatever key they bring."""
        self._app = app
        self._keys = keys
        self._open = _OPEN_PATHS | ({"/metrics"} if options.open_metrics else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            exchange = Exchange(scope, receive, send)
            if _CONTROLS.search(exchange.path):  # a route's pattern would match before a line end, too
                raise RouteNotFound("there is nothing at a path with control characters")
            scope[CALLER] = await self._caller(exchange)
        await self._app(scope, receive, send)

    async def _caller(self, exchange: Exchange) -> Caller:
        if self._keys is None:
            return anyone(next(iter(_brought(exchange)), None))
        method = exchange.scope["method"]
        is_page = method in ("GET", "HEAD") and exchange.path in _PAGES
        if method == "OPTIONS" or is_page or exchange.path in self._open:
            return NOBODY  # not even looked for: a probe must not wait for a file of keys
        caller = await self._keys.find(_brought(exchange))
        if caller is None:
            raise Unauthorized("this server asks for an API key: Authorization: Bearer KEY")
        return caller


def for_own_programs(endpoint: Endpoint, options: ApiOptions) -> Endpoint:
    """An endpoint that changes the server: with keys it is for admins (a page does not know their keys),
    without it is closed to pages from elsewhere.
    """
    if options.asks_for_key:

        async def closed_to_users(exchange: Exchange) -> None:
            if not exchange.caller.is_admin:
                raise Forbidden("this API key may not change the server")
            await endpoint(exchange)

        return closed_to_users

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


def _brought(exchange: Exchange) -> list[bytes]:
    """What may be a key: a bearer, X-API-Key, and ?api_key= (EventSource cannot set headers).

    Raises: BadRequest.
    """
    candidates: list[bytes] = []
    if (own := exchange.header(b"x-api-key")) is not None:
        candidates.append(own.encode("latin-1"))
    scheme, _, token = (exchange.header(b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer":
        candidates.append(token.strip().encode("latin-1"))
    if b"api_key" in exchange.scope["query_string"]:
        candidates += [value.encode("utf-8") for name, value in exchange.query() if name == "api_key"]
    return candidates[:_MOST_CANDIDATES]
