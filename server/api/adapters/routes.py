"""The table of the routes about adapters, and of the list of models."""

from starlette.routing import Route

from server.api.adapters import changes, lists, vllm
from server.api.adapters.chapter import CHAPTER
from server.api.adapters.form import silence_parser
from server.api.guard import for_own_programs
from server.api.http import Endpoint, Resource
from server.api.protocol import Protocol
from server.api.state import ServerState


def _routes(state: ServerState) -> list[Route]:
    silence_parser()

    def guarded(endpoint: Endpoint) -> Endpoint:
        return for_own_programs(endpoint, state.options)

    return [
        Route("/v1/models", Resource(get=vllm.models_endpoint(state))),
        Route("/v1/models/{id:path}", Resource(get=vllm.model_endpoint(state))),
        Route("/v1/load_lora_adapter", Resource(post=guarded(vllm.load_endpoint(state)))),
        Route("/v1/unload_lora_adapter", Resource(post=guarded(vllm.unload_endpoint(state)))),
        Route(
            "/v1/adapters",
            Resource(get=lists.list_endpoint(state), post=guarded(changes.add_endpoint(state))),
        ),
        # POST alone: with any other method the last part belongs to an adapter's name.
        Route(
            "/v1/adapters/{id:path}/pin",
            Resource(post=guarded(changes.pin_endpoint(state))),
            methods=["POST"],
        ),
        Route(
            "/v1/adapters/{id:path}/unpin",
            Resource(post=guarded(changes.unpin_endpoint(state))),
            methods=["POST"],
        ),
        Route(
            "/v1/adapters/{id:path}",
            Resource(get=lists.one_endpoint(state), delete=guarded(changes.remove_endpoint(state))),
        ),
    ]


PROTOCOL = Protocol(_routes, (CHAPTER,))
