"""Which models there are, in Ollama's words: the base model and, as models of their own, its adapters.

`details.parent_model` says what an adapter belongs to. Names are bare ids, as everywhere here, and all routes
take `id:latest` as well. Models are neither fetched nor made at a client's wish: pulling one that is here
succeeds, as programs expect that pull before they use a model, and everything that would change something is
refused.
"""

import hashlib

from adapters.types import AdapterInfo
from server.api.access import find_adapter, usable_adapters
from server.api.generation import held_tokenizer, hold_adapter, read_json
from server.api.http import Endpoint, Exchange
from server.api.json_body import check_tolerated_type
from server.api.names import without_tag
from server.api.ollama.endpoint import model_name, not_found
from server.api.ollama.render import rfc3339
from server.api.ollama.schema import NamedBody
from server.api.ports import ModelCard, Service
from server.api.schema import validate
from server.api.shapes import to_json
from server.api.state import ServerState
from server.errors import BadRequest, ModelNotFound

SPOKEN_VERSION = "0.33.0"
"""The release of Ollama whose routes these are: clients compare it with the one they need."""

_NEVER = "2318-01-01T00:00:00Z"  # the year that Ollama says for a model that stays
_FILE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_QUANTIZED = {"int8": "Q8_0", "int4": "Q4_0"}
_NDJSON = b"application/x-ndjson"
_UNITS = ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K"))


def _quantization_level(card: ModelCard) -> str:
    """As Ollama names its files, by what comes nearest to ours."""
    return _QUANTIZED.get(card.quantization) or _FILE_TYPES.get(card.dtype, card.dtype)


def version_endpoint(state: ServerState) -> Endpoint:
    """`GET /api/version`, in every phase."""

    async def endpoint(exchange: Exchange) -> None:
        await exchange.answer(to_json({"version": SPOKEN_VERSION, "motet": state.version}))

    return endpoint


def tags_endpoint(state: ServerState) -> Endpoint:
    """`GET /api/tags`: the base first, then the adapters by name; those that the caller may use."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        models = [_tag(service.card, None)] if exchange.caller.may_use(None) else []
        models += [_tag(service.card, info) for info in usable_adapters(service, exchange.caller)]
        await exchange.answer(to_json({"models": models}))

    return endpoint


def ps_endpoint(state: ServerState) -> Endpoint:
    """`GET /api/ps`: what of it is in memory."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        models = [_process(service.card, None)] if exchange.caller.may_use(None) else []
        models += [
            _process(service.card, info)
            for info in usable_adapters(service, exchange.caller)
            if service.registry.is_loaded(info.ref)
        ]
        await exchange.answer(to_json({"models": models}))

    return endpoint


def show_endpoint(state: ServerState) -> Endpoint:
    """`POST /api/show`"""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        asked = _named(await _read(state, service, exchange))
        name = without_tag(asked, service)
        is_base = service.card.is_base(name) and exchange.caller.may_use(None)
        adapter = None if is_base else find_adapter(name, service, exchange.caller)
        if adapter is None and not is_base:
            raise not_found(asked)
        if adapter is None:
            template = service.tokenizer.chat_template
        else:
            try:
                async with held_tokenizer(state, service, exchange, adapter.ref.name) as tokenizer:
                    template = tokenizer.chat_template
            except ModelNotFound:
                raise not_found(asked) from None
        await exchange.answer(to_json(_description(service.card, adapter, template or "")))

    return endpoint


def pull_endpoint(state: ServerState) -> Endpoint:
    """`POST /api/pull`: done at once for what is here, or in the folder of adapters."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        body = await _read(state, service, exchange)
        asked = _named(body)
        try:
            with state.preparing():
                lease = await hold_adapter(state, service, exchange, without_tag(asked, service))
        except ModelNotFound:
            raise ModelNotFound(
                f"model '{asked}' not found: this server does not download models, it takes adapters from "
                f"--adapters-dir and POST /v1/load_lora_adapter",
                param="model",
            ) from None
        if lease is not None:
            lease.release()
        success = to_json({"status": "success"})
        if body.stream is False:
            await exchange.answer(success)
        else:
            steps = to_json({"status": "pulling manifest"}) + b"\n" + success + b"\n"
            await exchange.answer(steps, content_type=_NDJSON)

    return endpoint


async def root(exchange: Exchange) -> None:
    """`GET /`: what Ollama's clients expect there."""
    vary = (b"vary", b"Accept")  # people get a page
    await exchange.answer(b"Ollama is running", content_type=b"text/plain; charset=utf-8", headers=[vary])


async def refuse_change(exchange: Exchange) -> None:
    """`/api/create`, `/api/copy`, `/api/delete`, `/api/push`"""
    raise BadRequest(
        f"{exchange.path} is not supported by this server: adapters are added with POST "
        f"/v1/load_lora_adapter and removed with POST /v1/unload_lora_adapter"
    )


def _named(body: NamedBody) -> str:
    return model_name(body.name if body.model is None else body.model)


async def _read(state: ServerState, service: Service, exchange: Exchange) -> NamedBody:
    check_tolerated_type(exchange.header(b"content-type"))
    raw = await exchange.read_body(state.options.max_body_bytes)
    return await read_json(service, raw, lambda value: validate(NamedBody, value))


def _tag(card: ModelCard, adapter: AdapterInfo | None) -> dict[str, object]:
    """An entry of the list. `adapter` None: the base model."""
    return {
        **_identity(card, adapter),
        "modified_at": _modified_at(card, adapter),
        "details": _details(card, adapter),
        "capabilities": ["completion"],
    }


def _process(card: ModelCard, adapter: AdapterInfo | None) -> dict[str, object]:
    identity = _identity(card, adapter)
    return {
        **identity,
        "details": _details(card, adapter),
        "expires_at": _NEVER,
        "size_vram": identity["size"] if card.compute_type == "gpu" else 0,
        "context_length": card.max_model_len,
    }


def _identity(card: ModelCard, adapter: AdapterInfo | None) -> dict[str, object]:
    if adapter is None:
        name, size, made_of = card.id, card.num_bytes, card.fingerprint
    else:
        name, size, made_of = (
            adapter.ref.name,
            adapter.num_bytes,
            f"{card.fingerprint} {adapter.revision or adapter.ref.name}",
        )
    digest = hashlib.sha256(made_of.encode("utf-8")).hexdigest()
    return {"name": name, "model": name, "size": size, "digest": digest}


def _details(card: ModelCard, adapter: AdapterInfo | None) -> dict[str, object]:
    return {
        "parent_model": "" if adapter is None else card.id,
        "format": "safetensors",
        "family": card.family,
        "families": [card.family],
        "parameter_size": _in_units(card.num_parameters),
        "quantization_level": _quantization_level(card),
    }


def _description(card: ModelCard, adapter: AdapterInfo | None, template: str) -> dict[str, object]:
    """All that `/api/show` says."""
    name = card.id if adapter is None else adapter.ref.name
    parameters = _parameters(card)
    modelfile = [f"FROM {card.id}", *([] if adapter is None else [f"ADAPTER {name}"])]
    modelfile += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    family = card.family
    model_info: dict[str, object] = {
        "general.architecture": family,
        "general.basename": name,
        "general.parameter_count": card.num_parameters,
        f"{family}.block_count": card.num_layers,
        f"{family}.context_length": card.max_model_len,
        f"{family}.embedding_length": card.hidden_size,
        f"{family}.vocab_size": card.vocab_size,
    }
    if adapter is not None:
        model_info["adapter.type"] = "lora"
        model_info["adapter.lora.rank"] = adapter.rank
        model_info["adapter.lora.targets"] = list(adapter.targets)
    return {
        "modelfile": "\n".join(modelfile) + "\n",
        "parameters": "\n".join(f"{key:<30} {value}" for key, value in parameters.items()),
        "template": template,
        "details": _details(card, adapter),
        "model_info": model_info,
        "capabilities": ["completion"],
        "modified_at": _modified_at(card, adapter),
    }


def _parameters(card: ModelCard) -> dict[str, float]:
    """What the model's generation_config says, under the names that a Modelfile has for it."""
    usual = card.generation_defaults
    found = {
        "temperature": usual.temperature,
        "top_k": usual.top_k,
        "top_p": usual.top_p,
        "min_p": usual.min_p,
        "repeat_penalty": usual.repetition_penalty,
    }
    return {key: value for key, value in found.items() if value is not None}


def _modified_at(card: ModelCard, adapter: AdapterInfo | None) -> str:
    return rfc3339((card.created if adapter is None else adapter.created) * 1_000_000_000)


def _in_units(count: int) -> str:
    """A number of parameters as people say it: 1.2M."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)
