"""The ASGI application: the table of routes, inside the layers of http.py."""

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from server.api import (
    adapters_admin,
    anthropic,
    anthropic_docs,
    docs,
    embeddings,
    jobs,
    jobs_docs,
    kserve_docs,
    ollama,
    ollama_docs,
    ollama_embed,
    ollama_models,
    openai,
    openai_completions,
    openai_docs,
    ops,
    ops_docs,
    responses,
    responses_docs,
    responses_kept,
    tgi,
    tgi_docs,
    tgi_ops,
    tgi_tokens,
)
from server.api.generation import generation_endpoint
from server.api.guard import Guard, for_own_programs
from server.api.http import Identity, Refusals, Resource, cors
from server.api.json_body import check_json_type, check_tolerated_type
from server.api.keys import KeyRing
from server.api.kserve_routes import kserve_routes
from server.api.openapi import Table
from server.api.state import ServerState
from server.api.streaming import tame_sse_starlette
from server.errors import RouteNotFound

CHAPTERS = (
    openai_docs.CHAPTER,
    responses_docs.CHAPTER,
    anthropic_docs.CHAPTER,
    tgi_docs.CHAPTER,
    ollama_docs.CHAPTER,
    kserve_docs.CHAPTER,
    jobs_docs.CHAPTER,
    ops_docs.ADAPTERS,
    ops_docs.OPERATIONS,
)
"""What each route of the table is documented as."""


def build_app(state: ServerState) -> ASGIApp:
    """All routes over one state. The state may still be loading; each request looks at it anew.

    Raises: KeysError.
    """
    tame_sse_starlette()
    router = Router(routes=_routes(state), redirect_slashes=False, default=_not_found)
    guarded = Guard(router, state.options, _keys(state))
    open_to_pages = cors(Refusals(guarded), state.options.allowed_origins)
    return Identity(open_to_pages, new_id=state.new_id, clock=state.clock)


def _routes(state: ServerState) -> list[Route]:
    health = Resource(get=ops.health_endpoint(state))
    job_stream = Resource(get=jobs.stream_endpoint(state), post=jobs.stream_endpoint(state))
    routes = [
        Route(
            "/v1/chat/completions",
            Resource(post=generation_endpoint(state, openai.read_chat, check_json_type)),
        ),
        Route(
            "/v1/completions",
            Resource(post=generation_endpoint(state, openai_completions.read_completion, check_json_type)),
        ),
        Route(
            "/v1/embeddings",
            Resource(post=generation_endpoint(state, embeddings.read_embeddings, check_json_type)),
        ),
        Route(
            "/v1/responses",
            Resource(post=generation_endpoint(state, responses.responses_reader(state), check_json_type)),
        ),
        Route(
            "/v1/responses/{id}",
            Resource(
                get=responses_kept.response_endpoint(state),
                delete=responses_kept.delete_response_endpoint(state),
            ),
        ),
        Route(
            "/v1/responses/{id}/input_items",
            Resource(get=responses_kept.input_items_endpoint(state)),
        ),
        Route(
            "/v1/responses/{id}/cancel",
            Resource(post=responses_kept.cancel_response_endpoint(state)),
        ),
        Route(
            "/v1/messages",
            Resource(post=generation_endpoint(state, anthropic.read_messages, check_json_type)),
        ),
        Route("/v1/messages/count_tokens", Resource(post=anthropic.count_tokens_endpoint(state))),
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
        Route(
            "/invocations",
            Resource(post=generation_endpoint(state, tgi.read_invocation, check_tolerated_type)),
        ),
        Route("/info", Resource(get=tgi_ops.info_endpoint(state))),
        Route("/startup", Resource(get=tgi_ops.startup_endpoint(state))),
        Route("/tokenize", Resource(post=tgi_tokens.tokenize_endpoint(state))),
        Route("/chat_tokenize", Resource(post=tgi_tokens.chat_tokenize_endpoint(state))),
        Route("/detokenize", Resource(post=tgi_tokens.detokenize_endpoint(state))),
        *kserve_routes(state),
        Route("/api/generate", Resource(post=ollama.generate_endpoint(state))),
        Route("/api/chat", Resource(post=ollama.chat_endpoint(state))),
        Route("/api/embed", Resource(post=ollama_embed.embed_endpoint(state))),
        Route("/api/embeddings", Resource(post=ollama_embed.embeddings_endpoint(state))),
        Route("/api/tags", Resource(get=ollama_models.tags_endpoint(state))),
        Route("/api/ps", Resource(get=ollama_models.ps_endpoint(state))),
        Route("/api/show", Resource(post=ollama_models.show_endpoint(state))),
        Route("/api/version", Resource(get=ollama_models.version_endpoint(state))),
        Route("/api/pull", Resource(post=ollama_models.pull_endpoint(state))),
        Route("/api/push", Resource(post=ollama_models.refuse_change)),
        Route("/api/create", Resource(post=ollama_models.refuse_change)),
        Route("/api/copy", Resource(post=ollama_models.refuse_change)),
        Route("/api/delete", Resource(delete=ollama_models.refuse_change)),
        Route("/health", health),
        Route("/ping", health),
        Route("/ready", Resource(get=ops.ready_endpoint(state))),
        Route("/metrics", Resource(get=ops.metrics_endpoint(state))),
        Route("/version", Resource(get=ops.version_endpoint(state))),
        Route("/load", Resource(get=ops.server_load_endpoint(state))),
        Route(
            "/openapi.json",
            Resource(get=docs.document_endpoint(state, lambda: docs.table_of(routes), CHAPTERS)),
        ),
        Route("/docs", Resource(get=docs.page_endpoint())),
    ]
    return routes


def table(state: ServerState) -> Table:
    """The paths and methods of all routes."""
    return docs.table_of(_routes(state))


def _keys(state: ServerState) -> KeyRing | None:
    options = state.options
    return KeyRing(options.api_key, options.api_keys_file, state.clock) if options.asks_for_key else None


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose()(scope, receive, send)
        return
    raise RouteNotFound(f"there is nothing at {scope['method']} {scope['path']}")
