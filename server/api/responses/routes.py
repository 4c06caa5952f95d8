"""The table of `/v1/responses`."""

from starlette.routing import Route

from server.api.generation import generation_endpoint
from server.api.http import Resource
from server.api.json_body import check_json_type
from server.api.protocol import Protocol
from server.api.responses import kept
from server.api.responses.chapter import CHAPTER
from server.api.responses.wish import responses_reader
from server.api.state import ServerState


def _routes(state: ServerState) -> list[Route]:
    create = generation_endpoint(state, responses_reader(state), check_json_type)
    one = Resource(get=kept.response_endpoint(state), delete=kept.delete_response_endpoint(state))
    return [
        Route("/v1/responses", Resource(post=create)),
        Route("/v1/responses/{id}", one),
        Route("/v1/responses/{id}/input_items", Resource(get=kept.input_items_endpoint(state))),
        Route("/v1/responses/{id}/cancel", Resource(post=kept.cancel_response_endpoint(state))),
    ]


PROTOCOL = Protocol(_routes, (CHAPTER,))
