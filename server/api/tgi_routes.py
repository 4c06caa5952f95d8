"""The table of LoRAX's and TGI's routes. `GET /` is Ollama's: its clients look there for a server."""

from starlette.routing import Route

from server.api import tgi, tgi_ops, tgi_tokens
from server.api.generation import ReadWish, generation_endpoint
from server.api.http import Endpoint, Resource
from server.api.json_body import check_tolerated_type
from server.api.ollama_models import root
from server.api.state import ServerState


def routes(state: ServerState) -> list[Route]:
    def generates(read: ReadWish) -> Endpoint:
        return generation_endpoint(state, read, check_tolerated_type)

    return [
        Route("/", Resource(get=root, post=generates(tgi.read_compat))),
        Route("/generate", Resource(post=generates(tgi.read_generate))),
        Route("/generate_stream", Resource(post=generates(tgi.read_generate_stream))),
        Route("/invocations", Resource(post=generates(tgi.read_invocation))),
        Route("/info", Resource(get=tgi_ops.info_endpoint(state))),
        Route("/startup", Resource(get=tgi_ops.startup_endpoint(state))),
        Route("/tokenize", Resource(post=tgi_tokens.tokenize_endpoint(state))),
        Route("/chat_tokenize", Resource(post=tgi_tokens.chat_tokenize_endpoint(state))),
        Route("/detokenize", Resource(post=tgi_tokens.detokenize_endpoint(state))),
    ]
