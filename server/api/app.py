"""The ASGI application: the tables of all protocols, inside the layers of http.py.

A protocol is one row of `PROTOCOLS`: its table of routes, and the chapters that document it.
"""

from collections.abc import Callable
from typing import NamedTuple

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from server.api import (
    anthropic_docs,
    anthropic_routes,
    docs,
    jobs_docs,
    jobs_routes,
    kserve_docs,
    kserve_routes,
    ollama_docs,
    ollama_routes,
    openai_docs,
    openai_routes,
    ops_docs,
    ops_routes,
    responses_docs,
    responses_routes,
    tgi_docs,
    tgi_routes,
)
from server.api.guard import Guard
from server.api.http import Identity, Refusals, Resource, cors
from server.api.keys import KeyRing
from server.api.openapi import Table
from server.api.operations import Chapter
from server.api.state import ServerState
from server.api.streaming import tame_sse_starlette
from server.errors import RouteNotFound


class Protocol(NamedTuple):
    """What the application knows of one."""

    routes: Callable[[ServerState], list[Route]]
    chapters: tuple[Chapter, ...]


PROTOCOLS = (
    Protocol(openai_routes.routes, (openai_docs.CHAPTER,)),
    Protocol(responses_routes.routes, (responses_docs.CHAPTER,)),
    Protocol(anthropic_routes.routes, (anthropic_docs.CHAPTER,)),
    Protocol(tgi_routes.routes, (tgi_docs.CHAPTER,)),
    Protocol(ollama_routes.routes, (ollama_docs.CHAPTER,)),
    Protocol(kserve_routes.routes, (kserve_docs.CHAPTER,)),
    Protocol(jobs_routes.routes, (jobs_docs.CHAPTER,)),
    Protocol(ops_routes.routes, (ops_docs.ADAPTERS, ops_docs.OPERATIONS)),
)

CHAPTERS = tuple(chapter for protocol in PROTOCOLS for chapter in protocol.chapters)


def build_app(state: ServerState) -> ASGIApp:
    """All routes over one state. The state may still be loading; each request looks at it anew.

    Raises: KeysError.
    """
    tame_sse_starlette()
    router = Router(routes=_routes(state), redirect_slashes=False, default=_not_found)
    guarded = Guard(router, state.options, _keys(state))
    open_to_pages = cors(Refusals(guarded), state.options.allowed_origins)
    return Identity(open_to_pages, new_id=state.new_id, clock=state.clock)


def table(state: ServerState) -> Table:
    """The paths and methods of all routes."""
    return docs.table_of(_routes(state))


def _routes(state: ServerState) -> list[Route]:
    routes = [route for protocol in PROTOCOLS for route in protocol.routes(state)]
    document = docs.document_endpoint(state, lambda: docs.table_of(routes), CHAPTERS)
    routes += [
        Route("/openapi.json", Resource(get=document)),
        Route("/docs", Resource(get=docs.page_endpoint())),
    ]
    return routes


def _keys(state: ServerState) -> KeyRing | None:
    options = state.options
    return KeyRing(options.api_key, options.api_keys_file, state.clock) if options.asks_for_key else None


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose()(scope, receive, send)
        return
    raise RouteNotFound(f"there is nothing at {scope['method']} {scope['path']}")
