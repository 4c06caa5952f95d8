"""The table of KServe v2's routes. Ids may hold slashes, so what follows an id decides where it ends."""

from starlette.routing import Route

from server.api.access import find_app
from server.api.generation import ReadWish, generation_endpoint
from server.api.guard import for_own_programs
from server.api.http import Endpoint, Exchange, Resource
from server.api.json_body import check_tolerated_type
from server.api.kserve import apps, models, wish
from server.api.kserve.apps import Action
from server.api.kserve.chapter import CHAPTER
from server.api.protocol import Protocol
from server.api.state import ServerState
from server.errors import BadRequest

_READERS: tuple[tuple[Action, ReadWish], ...] = (
    ("infer", wish.read_infer),
    ("generate", wish.read_generate),
    ("generate_stream", wish.read_generate_stream),
)


def _routes(state: ServerState) -> list[Route]:
    """The first that fits counts."""
    metadata = Resource(get=models.metadata_endpoint(state))
    is_ready = Resource(get=models.model_ready_endpoint(state))
    load = for_own_programs(models.load_endpoint(state), state.options)
    unload = for_own_programs(models.unload_endpoint(state), state.options)
    table = [
        Route("/v2", Resource(get=models.server_endpoint(state))),
        Route("/v2/health/live", Resource(get=models.live_endpoint(state))),
        Route("/v2/health/ready", Resource(get=models.ready_endpoint(state))),
        Route("/v2/repository/index", Resource(post=models.index_endpoint(state))),
        Route("/v2/repository/models/{id:path}/load", Resource(post=load)),
        Route("/v2/repository/models/{id:path}/unload", Resource(post=unload)),
    ]
    for model in ("/v2/models/{id:path}/versions/{version}", "/v2/models/{id:path}"):
        for action, read_wish in _READERS:
            table.append(Route(f"{model}/{action}", Resource(post=_model_endpoint(state, action, read_wish))))
        table.append(Route(f"{model}/ready", is_ready))
        table.append(Route(model, metadata))
    return table


def _model_endpoint(state: ServerState, action: Action, read_wish: ReadWish) -> Endpoint:
    """The model in the path is an app, or ours."""
    of_app = apps.app_endpoint(state, action)
    of_ours = generation_endpoint(state, read_wish, check_tolerated_type)

    async def endpoint(exchange: Exchange) -> None:
        models.check_version(exchange)
        if exchange.header(b"inference-header-content-length") is not None:
            raise BadRequest("binary tensor data is not supported: send the data as JSON")
        is_app = find_app(exchange.path_param("id"), state.apps, exchange.caller) is not None
        await (of_app if is_app else of_ours)(exchange)

    return endpoint


PROTOCOL = Protocol(_routes, (CHAPTER,))
