"""The ASGI application: the routes of all protocols, inside the layers of http.py."""

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from server.api.adapters import routes as adapters
from server.api.anthropic import routes as anthropic
from server.api.docs.document import Table
from server.api.docs.endpoints import document_endpoint, table_of
from server.api.guard import Guard
from server.api.http import Identity, Refusals, Resource, cors
from server.api.jobs import routes as jobs
from server.api.keys import KeyRing
from server.api.kserve import routes as kserve
from server.api.ollama import routes as ollama
from server.api.openai import routes as openai
from server.api.ops import routes as ops
from server.api.pages import page_endpoint
from server.api.responses import routes as responses
from server.api.state import ServerState
from server.api.streaming import tame_sse_starlette
from server.api.tgi import routes as tgi
from server.errors import RouteNotFound

PROTOCOLS = (
    openai.PROTOCOL,
    responses.PROTOCOL,
    anthropic.PROTOCOL,
    tgi.PROTOCOL,
    ollama.PROTOCOL,
    kserve.PROTOCOL,
    jobs.PROTOCOL,
    adapters.PROTOCOL,
    ops.PROTOCOL,
)
"""Everything that the server speaks, in the order of the documentation."""

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
    return table_of(_routes(state))


def _routes(state: ServerState) -> list[Route]:
    routes = [route for protocol in PROTOCOLS for route in protocol.routes(state)]
    document = document_endpoint(state, lambda: table_of(routes), CHAPTERS)
    routes += [
        Route("/openapi.json", Resource(get=document)),
        Route("/docs", Resource(get=page_endpoint("docs"))),
        Route("/playground", Resource(get=page_endpoint("playground"))),
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
