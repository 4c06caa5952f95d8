"""The table of LoRAX's and TGI's routes. `GET /` is for Ollama's clients, which look there for a server,
and for people.
"""

from starlette.routing import Route

from server.api.generation import ReadWish, generation_endpoint
from server.api.http import Endpoint, Resource
from server.api.json_body import check_tolerated_type
from server.api.ollama.models import root
from server.api.pages import page_or
from server.api.protocol import Protocol
from server.api.state import ServerState
from server.api.tgi import ops, tokens, wish
from server.api.tgi.chapter import CHAPTER


def _routes(state: ServerState) -> list[Route]:
    def generates(read: ReadWish) -> Endpoint:
        return generation_endpoint(state, read, check_tolerated_type)

    return [
        Route("/", Resource(get=page_or("playground", root), post=generates(wish.read_compat))),
        Route("/generate", Resource(post=generates(wish.read_generate))),
        Route("/generate_stream", Resource(post=generates(wish.read_generate_stream))),
        Route("/invocations", Resource(post=generates(wish.read_invocation))),
        Route("/info", Resource(get=ops.info_endpoint(state))),
        Route("/startup", Resource(get=ops.startup_endpoint(state))),
        Route("/tokenize", Resource(post=tokens.tokenize_endpoint(state))),
        Route("/chat_tokenize", Resource(post=tokens.chat_tokenize_endpoint(state))),
        Route("/detokenize", Resource(post=tokens.detokenize_endpoint(state))),
    ]


PROTOCOL = Protocol(_routes, (CHAPTER,))
