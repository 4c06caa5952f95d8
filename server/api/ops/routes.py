"""The table of the routes for those who run the server."""

from starlette.routing import Route

from server.api.http import Resource
from server.api.ops import probes
from server.api.ops.chapter import OPERATIONS
from server.api.protocol import Protocol
from server.api.state import ServerState


def _routes(state: ServerState) -> list[Route]:
    health = Resource(get=probes.health_endpoint(state))
    return [
        Route("/health", health),
        Route("/ping", health),
        Route("/ready", Resource(get=probes.ready_endpoint(state))),
        Route("/metrics", Resource(get=probes.metrics_endpoint(state))),
        Route("/version", Resource(get=probes.version_endpoint(state))),
        Route("/load", Resource(get=probes.server_load_endpoint(state))),
    ]


PROTOCOL = Protocol(_routes, (OPERATIONS,))
