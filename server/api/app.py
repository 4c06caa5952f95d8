"""The ASGI application: the table of routes, inside the layers of http.py."""

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from server.api import adapters_admin, jobs, openai, ops, tgi
from server.api.generation import generation_endpoint
from server.api.guard import Guard, for_own_programs
from server.api.http import Identity, Refusals, Resource, cors
from server.api.json_body import check_json_type, check_tolerated_type
from server.api.state import ServerState
from server.api.streaming import tame_sse_starlette
from server.errors import RouteNotFound


def build_app(state: ServerState) -> ASGIApp:
    """All routes over one state. The state may still be loading; each request looks at it anew."""
    tame_sse_starlette()
    router = Router(routes=_routes(state), redirect_slashes=False, default=_not_found)
    guarded = Guard(router, state.options)
    open_to_pages = cors(Refusals(guarded), state.options.allowed_origins)
    return Identity(open_to_pages, new_id=state.new_id, clock=state.clock)


def _routes(state: ServerState) -> list[Route]:
    health = Resource(get=ops.health_endpoint(state))
    job_stream = Resource(get=jobs.stream_endpoint(state), post=jobs.stream_endpoint(state))
    return [
        Route(
            "/v1/chat/completions",
            Resource(post=generation_endpoint(state, openai.read_chat, check_json_type)),
        ),
        Route(
            "/v1/completions",
            Resource(post=generation_endpoint(state, openai.read_completion, check_json_type)),
        ),
        Route("/v1/models", Resource(get=adapters_admin.models_endpoint(state))),
        Route("/v1/models/{id:path}", Resource(get=adapters_admin.model_endpoint(state))),
        Route(
            "/v1/load_lora_adapter",
            Resource(post=for_own_programs(adapters_admin.load_endpoint(state), state.options)),
        ),
        Route(
            "/v1/unload_lora_adapter",
            Resource(post=for_own_programs(adapters_admin.unload_endpoint(state), state.options)),
        ),
        Route(
            "/",
            Resource(get=ops.root, post=generation_endpoint(state, tgi.read_compat, check_tolerated_type)),
        ),
        Route(
            "/generate", Resource(post=generation_endpoint(state, tgi.read_generate, check_tolerated_type))
        ),
        Route(
            "/generate_stream",
            Resource(post=generation_endpoint(state, tgi.read_generate_stream, check_tolerated_type)),
        ),
        Route("/api/jobs/{id:path}/infer/stream", job_stream),
        Route("/api/jobs/{id:path}/infer", Resource(post=jobs.infer_endpoint(state))),
        Route("/info", Resource(get=tgi.info_endpoint(state))),
        Route("/tokenize", Resource(post=tgi.tokenize_endpoint(state))),
        Route("/health", health),
        Route("/ping", health),
        Route("/ready", Resource(get=ops.ready_endpoint(state))),
        Route("/metrics", Resource(get=ops.metrics_endpoint(state))),
        Route("/version", Resource(get=ops.version_endpoint(state))),
        Route("/load", Resource(get=ops.server_load_endpoint(state))),
    ]


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose()(scope, receive, send)
        return
    raise RouteNotFound(f"there is nothing at {scope['method']} {scope['path']}")
