"""What Ollama's routes that run the model share: names in Ollama's spelling, and calls that only load.

A request that asks for nothing loads its model: the adapter is fetched, and the answer says so, at once and
in one piece.
"""

from collections.abc import Callable
from typing import Protocol

from server.api.generation import generate, hold_adapter, read_json
from server.api.http import Endpoint, Exchange
from server.api.json_body import check_tolerated_type
from server.api.names import without_tag
from server.api.ports import Service
from server.api.records import Wish
from server.api.state import ServerState
from server.api.streaming import while_connected
from server.errors import BadRequest, ModelNotFound


class ModelWish(Wish, Protocol):
    """A wish that names its model as Ollama's clients do, and may be about nothing but that model."""

    @property
    def asked_model(self) -> str:
        """As the client wrote it."""
        ...

    @property
    def is_load(self) -> bool: ...

    def for_model(self, name: str) -> "ModelWish":
        """The same, under the name that the registry knows."""
        ...

    def load_answer(self) -> bytes:
        """What a load call is answered."""
        ...


def model_endpoint(state: ServerState, read: Callable[[dict[str, object]], ModelWish]) -> Endpoint:
    """A route that generates, embeds or loads; `read` raises BadRequest."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        check_tolerated_type(exchange.header(b"content-type"))
        raw = await exchange.read_body(state.options.max_body_bytes)
        state.num_active += 1
        try:
            asked = await read_json(service, raw, read)
            del raw  # not kept while the answer runs
            name = without_tag(asked.asked_model, service)
            if asked.is_load:
                await while_connected(exchange, _load(state, service, exchange, asked, name))
            else:
                await while_connected(exchange, generate(state, service, exchange, asked.for_model(name)))
        except ModelNotFound:
            raise not_found(asked.asked_model) from None
        finally:
            state.num_active -= 1

    return endpoint


def model_name(name: str | None) -> str:
    """The name that every request of Ollama's clients has to bring. Raises: BadRequest."""
    if name is None:
        raise BadRequest("model is required", param="model")
    return name


def not_found(name: str) -> ModelNotFound:
    """In the words that Ollama's clients look for."""
    return ModelNotFound(f"model '{name}' not found", param="model")


async def _load(
    state: ServerState, service: Service, exchange: Exchange, asked: ModelWish, name: str
) -> None:
    """Fetch the adapter, and say so. Nothing is ever unloaded on a client's wish: others may use it."""
    with state.preparing():
        lease = await hold_adapter(state, service, exchange, name)
    if lease is not None:
        lease.release()
    await exchange.answer(asked.load_answer())
