"""The table of Anthropic's routes."""

from starlette.routing import Route

from server.api.anthropic.chapter import CHAPTER
from server.api.anthropic.wish import count_tokens_endpoint, read_messages
from server.api.generation import generation_endpoint
from server.api.http import Resource
from server.api.json_body import check_json_type
from server.api.protocol import Protocol
from server.api.state import ServerState


def _routes(state: ServerState) -> list[Route]:
    return [
        Route("/v1/messages", Resource(post=generation_endpoint(state, read_messages, check_json_type))),
        Route("/v1/messages/count_tokens", Resource(post=count_tokens_endpoint(state))),
    ]


PROTOCOL = Protocol(_routes, (CHAPTER,))
