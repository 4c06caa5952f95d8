"""The table of the routes for those who run the server, and for its adapters."""

from starlette.routing import Route

from server.api.guard import for_own_programs
from server.api.http import Resource
from server.api.ops import adapters, probes
from server.api.ops.chapter import ADAPTERS, OPERATIONS
from server.api.protocol import Protocol
from server.api.state import ServerState


def _routes(state: ServerState) -> list[Route]:
    load = for_own_programs(adapters.load_endpoint(state), state.options)
    unload = for_own_programs(adapters.unload_endpoint(state), state.options)
    health = Resource(get=probes.health_endpoint(state))
    return [
        Route("/v1/models", Resource(get=adapters.models_endpoint(state))),
        Route("/v1/models/{id:path}", Resource(get=adapters.model_endpoint(state))),
        Route("/v1/load_lora_adapter", Resource(post=load)),
        Route("/v1/unload_lora_adapter", Resource(post=unload)),
        Route("/health", health),
        Route("/ping", health),
        Route("/ready", Resource(get=probes.ready_endpoint(state))),
        Route("/metrics", Resource(get=probes.metrics_endpoint(state))),
        Route("/version", Resource(get=probes.version_endpoint(state))),
        Route("/load", Resource(get=probes.server_load_endpoint(state))),
    ]


PROTOCOL = Protocol(_routes, (ADAPTERS, OPERATIONS))
