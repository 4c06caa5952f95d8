"""The table of the jobs routes. Ids may hold slashes, so the longer path comes first."""

from starlette.routing import Route

from server.api import jobs
from server.api.http import Resource
from server.api.state import ServerState


def routes(state: ServerState) -> list[Route]:
    stream = jobs.stream_endpoint(state)
    return [
        Route("/api/jobs/{id:path}/infer/stream", Resource(get=stream, post=stream)),
        Route("/api/jobs/{id:path}/infer", Resource(post=jobs.infer_endpoint(state))),
    ]
