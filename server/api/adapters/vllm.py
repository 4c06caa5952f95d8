"""vLLM's load and unload routes, and the list of models that they change.

Both routes are idempotent, because the controllers that call them repeat themselves: loading the same content
under the same name again is 200, and so is unloading a name that is not there (vLLM answers 404; a controller
that retries after a lost answer would then never be done). The answers are plain text that says what
happened.
"""

from adapters.types import AdapterInfo
from server.api.access import find_adapter, usable_adapters
from server.api.adapters.changes import check_new_name, load_adapter
from server.api.adapters.lists import answer_list
from server.api.adapters.schema import LoadBody, UnloadBody
from server.api.generation import read_json
from server.api.http import Endpoint, Exchange
from server.api.json_body import check_json_type
from server.api.ports import ModelCard, Service
from server.api.schema import validate
from server.api.shapes import to_json
from server.api.state import ServerState
from server.errors import ModelNotFound

_TEXT = b"text/plain; charset=utf-8"


def load_endpoint(state: ServerState) -> Endpoint:
    """`POST /v1/load_lora_adapter`"""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        check_json_type(exchange.header(b"content-type"))
        raw = await exchange.read_body(state.options.max_body_bytes)
        body = await read_json(service, raw, lambda value: validate(LoadBody, value))
        check_new_name(body.lora_name, service, "lora_name")
        await load_adapter(service, body.lora_name, body.lora_path, replace=bool(body.load_inplace))
        await _say(exchange, f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    return endpoint


def unload_endpoint(state: ServerState) -> Endpoint:
    """`POST /v1/unload_lora_adapter`"""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        check_json_type(exchange.header(b"content-type"))
        raw = await exchange.read_body(state.options.max_body_bytes)
        body = await read_json(service, raw, lambda value: validate(UnloadBody, value))
        check_new_name(body.lora_name, service, "lora_name")
        if await service.retire(body.lora_name) is not None:
            await _say(exchange, f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
        else:
            await _say(exchange, f"LoRA adapter '{body.lora_name}' is not loaded: nothing to do.")

    return endpoint


def models_endpoint(state: ServerState) -> Endpoint:
    """`GET /v1/models`: the base first, then the adapters by name; those that the caller may use."""

    async def endpoint(exchange: Exchange) -> None:
        await _answer_list(exchange, state.require_service())

    return endpoint


def model_endpoint(state: ServerState) -> Endpoint:
    """`GET /v1/models/{id}`, where an id may hold slashes."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        name = exchange.path_param("id")
        if not name:  # /v1/models/
            await _answer_list(exchange, service)
        elif service.card.is_base(name) and exchange.caller.may_use(None):
            await exchange.answer(to_json(_base_card(service.card)))
        elif (adapter := find_adapter(name, service, exchange.caller)) is not None:
            await exchange.answer(to_json(_adapter_card(adapter, service.card)))
        else:
            raise ModelNotFound(f"The model `{name}` does not exist.", param="model")

    return endpoint


async def _answer_list(exchange: Exchange, service: Service) -> None:
    cards = [_base_card(service.card)] if exchange.caller.may_use(None) else []
    cards += [_adapter_card(info, service.card) for info in usable_adapters(service, exchange.caller)]
    await answer_list(exchange, service, {"object": "list", "data": cards})


def _base_card(card: ModelCard) -> dict[str, object]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "motet",
        "root": card.id,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [],
    }


def _adapter_card(adapter: AdapterInfo, card: ModelCard) -> dict[str, object]:
    return {
        "id": adapter.ref.name,
        "object": "model",
        "created": adapter.created,
        "owned_by": "motet",
        "root": adapter.root,
        "parent": card.id,
        "max_model_len": None,
        "permission": [],
        "revision": adapter.revision,
    }


async def _say(exchange: Exchange, text: str) -> None:
    await exchange.answer(text.encode("utf-8"), content_type=_TEXT)
