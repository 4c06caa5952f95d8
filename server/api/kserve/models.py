"""KServe v2 about models: the server, its health, metadata, and the repository of what can be loaded.

A model is the base, an adapter or an Inferless app; `load` and `unload` mean the adapter registry for the one
and the app's process for the other, and can be repeated, as controllers do. An app that has been unloaded
does not keep the server from being ready; one that fails does, which is what Triton does by default.
"""

from collections.abc import Callable

from server.api.access import find_adapter, find_app, usable_adapters, usable_name
from server.api.adapters.changes import check_new_name, load_adapter
from server.api.generation import read_json
from server.api.http import Endpoint, Exchange
from server.api.json_body import check_tolerated_type
from server.api.kserve.render import EXTRAS, MODEL_VERSION
from server.api.kserve.schema import IndexBody, RepositoryBody
from server.api.names import adapter_name
from server.api.ports import Service
from server.api.schema import M, validate
from server.api.shapes import to_json
from server.api.state import Phase, ServerState
from server.errors import BadRequest, ModelNotFound, Unavailable
from server.inferless.schema import FAMILIES, Family
from server.inferless.worker import AppState, AppWorker

_RETRY_AFTER_S = 5
_NO_STORE = (b"cache-control", b"no-store")
_EXTENSIONS = ("generate", "model_repository")
_EMPTY = b"{}"
_PARAMETERS = (  # of our own models: what metadata says about their inputs beside the text
    ("max_tokens", "INT32"),
    ("temperature", "FP32"),
    ("top_p", "FP32"),
    ("top_k", "INT32"),
    ("min_p", "FP32"),
    ("repetition_penalty", "FP32"),
    ("frequency_penalty", "FP32"),
    ("presence_penalty", "FP32"),
    ("seed", "UINT64"),
    ("stop", "BYTES"),
    ("exclude_input_in_output", "BOOL"),
    ("return_finish_reason", "BOOL"),
    ("return_num_input_tokens", "BOOL"),
    ("return_num_output_tokens", "BOOL"),
)


def server_endpoint(state: ServerState) -> Endpoint:
    """`GET /v2`"""

    async def endpoint(exchange: Exchange) -> None:
        said = {"name": "motet", "version": state.version, "extensions": list(_EXTENSIONS)}
        await exchange.answer(to_json(said))

    return endpoint


def live_endpoint(state: ServerState) -> Endpoint:
    """`GET /v2/health/live`: whether the process is worth keeping."""

    async def endpoint(exchange: Exchange) -> None:
        await _answer_health(exchange, "live", state.is_alive)

    return endpoint


def ready_endpoint(state: ServerState) -> Endpoint:
    """`GET /v2/health/ready`: whether every model takes requests."""

    async def endpoint(exchange: Exchange) -> None:
        is_ready = state.is_alive and state.phase is Phase.READY and state.apps.are_ready
        await _answer_health(exchange, "ready", is_ready)

    return endpoint


def model_ready_endpoint(state: ServerState) -> Endpoint:
    """`GET /v2/models/{id}[/versions/{version}]/ready`"""

    async def endpoint(exchange: Exchange) -> None:
        check_version(exchange)
        service = state.require_service()
        app = find_app(exchange.path_param("id"), state.apps, exchange.caller)
        if app is not None and app.state is not AppState.READY:
            raise Unavailable(app.reason, param="model", retry_after_s=_RETRY_AFTER_S)
        name = _known_name(exchange, service) if app is None else app.name
        await exchange.answer(to_json({"name": name, "ready": True}), headers=[_NO_STORE])

    return endpoint


def metadata_endpoint(state: ServerState) -> Endpoint:
    """`GET /v2/models/{id}[/versions/{version}]`"""

    async def endpoint(exchange: Exchange) -> None:
        check_version(exchange)
        service = state.require_service()
        app = find_app(exchange.path_param("id"), state.apps, exchange.caller)
        metadata = _own_metadata(_known_name(exchange, service)) if app is None else _app_metadata(app)
        await exchange.answer(to_json(metadata))

    return endpoint


def index_endpoint(state: ServerState) -> Endpoint:
    """`POST /v2/repository/index`"""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        body = await _read(state, service, exchange, IndexBody)
        caller = exchange.caller
        names = [service.card.id] if caller.may_use(None) else []
        names += [info.ref.name for info in usable_adapters(service, caller)]
        entries = [_entry(name, is_ready=True) for name in names]
        apps = [app for app in state.apps if caller.may_use(app.name)]
        entries += [_entry(app.name, app.state is AppState.READY, app.reason) for app in apps]
        if body.ready:
            entries = [entry for entry in entries if entry["state"] == "READY"]
        await exchange.answer(to_json(entries))

    return endpoint


def load_endpoint(state: ServerState) -> Endpoint:
    """`POST /v2/repository/models/{id}/load`: start an app, or load an adapter: by its name, or with the
    parameter `lora_path` from that folder.
    """

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        body = await _read(state, service, exchange, RepositoryBody)
        name = exchange.path_param("id")
        if (app := state.apps.get(name)) is not None:
            app.start()
        elif not service.card.is_base(name):
            await _load_adapter(service, exchange, (body.parameters or {}).get("lora_path"))
        await exchange.answer(_EMPTY)

    return endpoint


def unload_endpoint(state: ServerState) -> Endpoint:
    """`POST /v2/repository/models/{id}/unload`"""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        await _read(state, service, exchange, RepositoryBody)
        name = exchange.path_param("id")
        if (app := state.apps.get(name)) is not None:
            await app.stop(state.options.unload_timeout_s)
        elif service.card.is_base(name):
            raise BadRequest("the base model cannot be unloaded", param="model")
        else:
            await service.retire(adapter_name(name, service))
        await exchange.answer(_EMPTY)

    return endpoint


def check_version(exchange: Exchange) -> None:
    """Raises: ModelNotFound for any version but ours, if the path names one."""
    version = exchange.scope["path_params"].get("version", MODEL_VERSION)
    if version != MODEL_VERSION:
        raise ModelNotFound(f"there is only version {MODEL_VERSION} of a model", param="version")


async def _answer_health(exchange: Exchange, what: str, is_so: bool) -> None:
    await exchange.answer(to_json({what: is_so}), status=200 if is_so else 503, headers=[_NO_STORE])


async def _read(state: ServerState, service: Service, exchange: Exchange, schema: type[M]) -> M:
    """A body that may be absent."""
    check_tolerated_type(exchange.header(b"content-type"))
    raw = await exchange.read_body(state.options.max_body_bytes)
    if not raw:
        return validate(schema, {})
    read: Callable[[dict[str, object]], M] = lambda value: validate(schema, value)  # noqa: E731
    return await read_json(service, raw, read)


async def _load_adapter(service: Service, exchange: Exchange, path: object) -> None:
    name = exchange.path_param("id")
    if path is None:
        # Loads it if its folder is there.
        lease = await service.resolve(usable_name(name, service, exchange.caller))
        if lease is not None:
            lease.release()
        return
    if not isinstance(path, str) or not path:
        raise BadRequest("lora_path must be a string", param="lora_path")
    check_new_name(name, service, "model")
    await load_adapter(service, name, path)


def _known_name(exchange: Exchange, service: Service) -> str:
    """What answers call the model in the path. Raises: ModelNotFound."""
    name = exchange.path_param("id")
    if service.card.is_base(name) and exchange.caller.may_use(None):
        return service.card.id
    adapter = find_adapter(name, service, exchange.caller)
    if adapter is None:
        raise ModelNotFound(f"there is no model {name!r}", param="model")
    return adapter.ref.name


def _own_metadata(name: str) -> dict[str, object]:
    inputs = [("text_input", "BYTES"), *_PARAMETERS]
    outputs = [("text_output", "BYTES")]
    outputs += [(extra, "BYTES" if extra == "finish_reason" else "UINT32") for extra in EXTRAS]
    return {
        "name": name,
        "versions": [MODEL_VERSION],
        "platform": "motet",
        "inputs": [_described(name, datatype, (-1,)) for name, datatype in inputs],
        "outputs": [_described(name, datatype, (-1,)) for name, datatype in outputs],
    }


def _app_metadata(app: AppWorker) -> dict[str, object]:
    """An app's outputs are not known before it answers."""
    inputs = () if app.schema is None else app.schema.inputs
    return {
        "name": app.name,
        "versions": [MODEL_VERSION],
        "platform": "inferless",
        "inputs": [
            _described(each.name, "BYTES" if each.family is Family.ANY else each.datatype, each.shape)
            for each in inputs
        ],
        "outputs": [],
    }


def _described(name: str, datatype: str, shape: tuple[int, ...]) -> dict[str, object]:
    assert datatype in FAMILIES
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def _entry(name: str, is_ready: bool, reason: str = "") -> dict[str, object]:
    return {
        "name": name,
        "version": MODEL_VERSION,
        "state": "READY" if is_ready else "UNAVAILABLE",
        "reason": reason,
    }
