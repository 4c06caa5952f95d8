"""The table of OpenAI's routes that generate, or make vectors."""

from starlette.routing import Route

from server.api.generation import ReadWish, generation_endpoint
from server.api.http import Resource
from server.api.json_body import check_json_type
from server.api.openai.chapter import CHAPTER
from server.api.openai.chat import read_chat
from server.api.openai.completions import read_completion
from server.api.openai.embeddings import read_embeddings
from server.api.protocol import Protocol
from server.api.state import ServerState

_READERS: tuple[tuple[str, ReadWish], ...] = (
    ("/v1/chat/completions", read_chat),
    ("/v1/completions", read_completion),
    ("/v1/embeddings", read_embeddings),
)


def _routes(state: ServerState) -> list[Route]:
    return [
        Route(path, Resource(post=generation_endpoint(state, read, check_json_type)))
        for path, read in _READERS
    ]


PROTOCOL = Protocol(_routes, (CHAPTER,))
