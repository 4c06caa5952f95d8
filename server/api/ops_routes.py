"""The table of the routes for those who run the server, and for its adapters."""

from starlette.routing import Route

from server.api import adapters_admin, ops
from server.api.guard import for_own_programs
from server.api.http import Resource
from server.api.state import ServerState


def routes(state: ServerState) -> list[Route]:
    load = for_own_programs(adapters_admin.load_endpoint(state), state.options)
    unload = for_own_programs(adapters_admin.unload_endpoint(state), state.options)
    health = Resource(get=ops.health_endpoint(state))
    return [
        Route("/v1/models", Resource(get=adapters_admin.models_endpoint(state))),
        Route("/v1/models/{id:path}", Resource(get=adapters_admin.model_endpoint(state))),
        Route("/v1/load_lora_adapter", Resource(post=load)),
        Route("/v1/unload_lora_adapter", Resource(post=unload)),
        Route("/health", health),
        Route("/ping", health),
        Route("/ready", Resource(get=ops.ready_endpoint(state))),
        Route("/metrics", Resource(get=ops.metrics_endpoint(state))),
        Route("/version", Resource(get=ops.version_endpoint(state))),
        Route("/load", Resource(get=ops.server_load_endpoint(state))),
    ]
