"""The table of the jobs routes. Ids may hold slashes, so the longer path comes first."""

from starlette.routing import Route

from server.api.http import Resource
from server.api.jobs import wish
from server.api.jobs.chapter import CHAPTER
from server.api.protocol import Protocol
from server.api.state import ServerState


def _routes(state: ServerState) -> list[Route]:
    stream = wish.stream_endpoint(state)
    return [
        Route("/api/jobs/{id:path}/infer/stream", Resource(get=stream, post=stream)),
        Route("/api/jobs/{id:path}/infer", Resource(post=wish.infer_endpoint(state))),
    ]


PROTOCOL = Protocol(_routes, (CHAPTER,))
