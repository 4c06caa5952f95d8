"""What clients call an adapter: its name, `<base>:<name>` as ZSE does, or `<name>:latest` as Ollama does."""

from server.api.ports import ModelCard, Service
from server.errors import BadRequest


def adapter_name(name: str, service: Service) -> str:
    """The adapter's own name, if this is another way to write it. A name that is one itself stays."""
    return name if service.registry.get(name) is not None else without_base(name, service.card)


def without_base(name: str, card: ModelCard) -> str:
    """`<base>:<adapter>` without the base. What names no adapter stays as it is, to be refused as a whole."""
    for base in card.served_names:
        adapter = name.removeprefix(f"{base}:")
        if adapter != name and not card.is_base(adapter):
            return adapter
    return name


def name_of_two(model: str | None, lora_id: str | None, card: ModelCard) -> str | None:
    """`lora_id` names the adapter; `model` beside it may only name the same one or the base.

    Raises: BadRequest.
    """
    if not lora_id:
        return model
    if model is None or card.is_base(model) or model == lora_id:
        return lora_id
    if without_base(model, card) != without_base(lora_id, card):
        raise BadRequest("model and lora_id name two different adapters", param="lora_id")
    return lora_id


def without_tag(name: str, service: Service) -> str:
    """`<name>:latest` without the tag. A name that is one itself, tag and all, stays."""
    bare = name.removesuffix(":latest")
    is_name = service.card.is_base(name) or service.registry.get(name) is not None
    return name if is_name or not bare else bare
