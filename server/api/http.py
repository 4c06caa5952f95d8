"""One HTTP request as the routes see it, and the pure ASGI layers that surround all of them.

    Identity( Cors( Refusals( Guard( routes ))))

Identity gives every request an id and a time of receipt, CORS adds its headers to everything that is answered
further in, Refusals turns what is raised into an answer in the shape of the path, Guard (in guard.py) asks
for a key and says whose it is. Each is a plain ASGI callable, so a stream passes through without being
wrapped, buffered or watched.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from urllib.parse import parse_qsl

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.types import Clock
from server.api.caller import Caller
from server.api.headers import EXPOSED_HEADERS
from server.api.shapes import shape_of, to_json
from server.errors import BadRequest, InternalError, MethodNotAllowed, PayloadTooLarge, ServeError
from server.log import without_text

log = logging.getLogger("motet.api")

RawHeaders = list[tuple[bytes, bytes]]

CALLER = "motet.caller"  # where Guard leaves word of who asks, in the scope

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")
_JSON_TYPE = b"application/json"
_MOST_FIELDS = 100  # in a query


class ClientGone(Exception):
    """The client left before its request was read: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request and the way to answer it."""

    scope: Scope
    receive: Receive
    send: Send

    @property
    def send_body(self) -> Send:
        """Where a body may go once the head has gone through `send`: straight to the server. The layers
        between have no more to do with it, and a token passes none of them.
        """
        send: Send = self.scope.get("motet.send", self.send)
        return send

    @property
    def write_now(self) -> Callable[[bytes], bool]:
        """Writes a part of a body, after the head and before the last part, if that takes no waiting; else
        False, and it is to be sent as any other. For servers that can do no more than ASGI: always False.
        """
        write: Callable[[bytes], bool] = self.scope.get("motet.write", _cannot)
        return write

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def request_id(self) -> str:
        return str(self.scope["motet.request_id"])

    @property
    def received(self) -> float:
        """Clock seconds at which the head of the request was there."""
        return float(self.scope["motet.received"])

    @property
    def caller(self) -> Caller:
        """Who asks, as Guard found."""
        caller = self.scope[CALLER]
        assert isinstance(caller, Caller)
        return caller

    def header(self, name: bytes) -> str | None:
        """The first header of this (lower case) name."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value).decode("latin-1")
        return None

    def path_param(self, name: str) -> str:
        return str(self.scope["path_params"][name])

    def query(self) -> list[tuple[str, str]]:
        """Names and values, in order. Raises: BadRequest."""
        try:
            text = self.scope["query_string"].decode("utf-8")
            return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
        except ValueError:
            raise BadRequest(f"the query must be UTF-8 and have {_MOST_FIELDS} fields at most") from None

    async def read_body(self, limit: int) -> bytes:
        """The whole body. Raises: PayloadTooLarge once `limit` bytes have been read and there is more;
        ClientGone.

        What is left of a body that is too large is discarded by the HTTP server, so that the client, which
        may read only after it has written, gets its answer.
        """
        parts: list[bytes] = []
        size, has_more = 0, True
        while has_more:
            part, has_more = await self.read_part()
            size += len(part)
            if size > limit:
                raise PayloadTooLarge(f"the request body is larger than {limit} bytes")
            parts.append(part)
        return b"".join(parts)

    async def read_part(self) -> tuple[bytes, bool]:
        """What has come of the body since the last call, and whether there is more. Raises: ClientGone."""
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)

    async def answer(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: bytes = _JSON_TYPE,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        """Send a complete answer."""
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-type", content_type),
                    (b"content-length", str(len(body)).encode("ascii")),
                    *headers,
                ],
            }
        )
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def answer_head(self, status: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send an answer without a body or its length: for HEAD, and for statuses that have none."""
        await self.send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, error: ServeError, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Answer with an error in the shape of the path."""
        shape = shape_of(self.path)
        more = list(headers)
        if error.retry_after_s is not None:
            more.append((b"retry-after", str(error.retry_after_s).encode("ascii")))
        if error.status == 401:
            more.append((b"www-authenticate", b"Bearer"))
        await self.answer(to_json(shape.body(error)), status=shape.status(error), headers=more)


def _cannot(body: bytes) -> bool:
    return False


Endpoint = Callable[[Exchange], Awaitable[None]]


class Resource:
    """All methods of one path. Anything else is 405 with Allow, in the shape of the path."""

    def __init__(
        self, *, get: Endpoint | None = None, post: Endpoint | None = None, delete: Endpoint | None = None
    ) -> None:
        self._endpoints: dict[str, Endpoint] = {}
        if get is not None:
            self._endpoints["GET"] = self._endpoints["HEAD"] = get
        if post is not None:
            self._endpoints["POST"] = post
        if delete is not None:
            self._endpoints["DELETE"] = delete

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that do something of their own."""
        return tuple(method for method in self._endpoints if method != "HEAD")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        method = scope["method"]
        endpoint = self._endpoints.get(method)
        if endpoint is not None:
            await endpoint(exchange)
            return
        allow = (b"allow", ", ".join([*self._endpoints, "OPTIONS"]).encode("ascii"))
        if method == "OPTIONS":
            await exchange.answer(b"", status=200, headers=[allow])
        else:
            await exchange.refuse(MethodNotAllowed(f"{method} is not allowed here"), [allow])


class Identity:
    """Gives every request an id (its own, if it brings a valid one) and writes it on whatever is answered."""

    def __init__(self, app: ASGIApp, *, new_id: Callable[[], str], clock: Clock) -> None:
        self._app = app
        self._new_id = new_id
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["motet.received"] = self._clock()
        scope["motet.send"] = send
        given = Exchange(scope, receive, send).header(b"x-request-id")
        request_id = given if given and _VALID_REQUEST_ID.fullmatch(given) else self._new_id()
        scope["motet.request_id"] = request_id
        header = (b"x-request-id", request_id.encode("ascii"))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self._app(scope, receive, send_with_id)


def cors(app: ASGIApp, allowed_origins: tuple[str, ...]) -> ASGIApp:
    """Any page may read answers, unless the operator names origins; never with credentials.

    Headers that a preflight asks for are mirrored (a literal `*` would not cover Authorization), and pages of
    public sites may call a server on the user's own machine or network.
    """
    return CORSMiddleware(
        app,
        allow_origins=allowed_origins,
        allow_methods=("*",),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=EXPOSED_HEADERS,
    )


class Refusals:
    """Turns what is raised further in into an answer: a ServeError into its own, anything else into a bare
    500.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        exchange = Exchange(scope, receive, send)
        try:
            await self._app(scope, receive, send_and_note)
        except ServeError as error:
            if not has_started:
                await exchange.refuse(error)
        except ClientGone:
            pass
        except Exception as error:  # the outermost frame of a request: nothing above could answer it
            log_bug(error, exchange.request_id)
            if not has_started:
                await exchange.refuse(InternalError("internal error"))
        # After the start nothing can be answered; returning without an end makes the HTTP server cut the
        # connection.


def log_bug(error: BaseException, request_id: str) -> None:
    """Log where an unexpected exception came from, without its text: that may hold a client's words."""
    log.error("request %s failed: %s", request_id, without_text(error))
