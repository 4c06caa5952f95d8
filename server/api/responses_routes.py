"""The table of `/v1/responses`."""

from starlette.routing import Route

from server.api import responses_kept
from server.api.generation import generation_endpoint
from server.api.http import Resource
from server.api.json_body import check_json_type
from server.api.responses import responses_reader
from server.api.state import ServerState


def routes(state: ServerState) -> list[Route]:
    create = generation_endpoint(state, responses_reader(state), check_json_type)
    kept = Resource(
        get=responses_kept.response_endpoint(state), delete=responses_kept.delete_response_endpoint(state)
    )
    return [
        Route("/v1/responses", Resource(post=create)),
        Route("/v1/responses/{id}", kept),
        Route("/v1/responses/{id}/input_items", Resource(get=responses_kept.input_items_endpoint(state))),
        Route("/v1/responses/{id}/cancel", Resource(post=responses_kept.cancel_response_endpoint(state))),
    ]
