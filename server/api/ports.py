"""What the HTTP layer needs from the layers below, in its own words.

`server.engine.service.Service` is the real thing; the tests bring a scripted one. Only names that routes use
are here, so that a protocol can be tested without an engine, a tokenizer or torch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol

from adapters.types import AdapterInfo, AdapterRef, AdapterStatus, AdapterUse, Revision, Unloaded
from server.errors import ServeError
from server.types import GenerationRequest, Retired, TokenEvent
from server.wishes import NO_WISH, AdapterWish


class Lease(Protocol):
    """The right to use what a request asked for, one adapter or several, until released."""

    @property
    def use(self) -> AdapterUse: ...
    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters that are in it; of a merged one, those that it was made of."""
        ...

    @property
    def source(self) -> str:
        """Where it comes from; several places with commas between."""
        ...

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """As in `GenerationRequest`."""
        ...

    @property
    def extras(self) -> object | None:
        """What else the adapter's folder holds for the service; see `Service.tokenizer_for`."""
        ...

    def release(self) -> None:
        """Synchronous and idempotent."""
        ...


class Registry(Protocol):
    """Names of adapters."""

    async def load(
        self,
        name: str,
        path: str,
        *,
        source: str | None = None,
        token: str | None = None,
        load_inplace: bool = False,
        is_pinned: bool = False,
    ) -> AdapterInfo:
        """`source`: what `path` is a location of; None: whatever it looks like.

        Raises: AdapterError. Loading the same content again changes nothing.
        """
        ...

    async def register(
        self,
        name: str,
        folder: Path,
        *,
        source: str,
        load_inplace: bool = False,
        is_pinned: bool = False,
    ) -> AdapterInfo:
        """As `load`, for a folder of our own. `source`: what lists say of it. Raises: AdapterError."""
        ...

    async def adopt(self, name: str, *, load_inplace: bool = False, is_pinned: bool = False) -> AdapterInfo:
        """As `load`, for the folder of the adapters folder that is called like the name."""
        ...

    async def unload(self, name: str, *, force: bool = False) -> Unloaded | None:
        """None: the name was not known. Who uses the adapter keeps it to the end."""
        ...

    def pin(self, name: str) -> AdapterInfo:
        """Keep it in memory. Raises: AdapterNotFound."""
        ...

    def unpin(self, name: str) -> AdapterInfo:
        """Raises: AdapterNotFound."""
        ...

    def status(self, name: str) -> AdapterStatus | None: ...

    def statuses(self) -> tuple[AdapterStatus, ...]:
        """Sorted by name; also of those that turned out to be broken, which `list` leaves out."""
        ...

    def list(self) -> tuple[AdapterInfo, ...]:
        """Sorted by name."""
        ...

    def get(self, name: str) -> AdapterInfo | None: ...

    def is_loaded(self, ref: AdapterRef) -> bool:
        """Whether its weights are in host memory."""
        ...


class TokenSpan(Protocol):
    """A token and the piece of the text that it stands for: characters [start, stop)."""

    @property
    def id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class Tokenizer(Protocol):
    """Text in, ids out."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_token_chars(self) -> int:
        """No token stands for more characters than this."""
        ...

    @property
    def chat_pool(self) -> Executor | None:
        """Where chats have to be rendered, because that waits; None: anywhere."""
        ...

    @property
    def has_chat_template(self) -> bool: ...
    @property
    def chat_template(self) -> str | None:
        """Its source."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> Sequence[TokenSpan]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def render_chat(
        self,
        messages: list[dict[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Raises: BadRequest with the template's own message."""
        ...

    def token_text(self, token_id: int) -> str:
        """A token by itself; U+FFFD for pieces of a character."""
        ...

    def special_text(self, token_id: int) -> str | None:
        """The spelling of a special token; None for all others."""
        ...

    def spell_token(self, token_id: int) -> bytes:
        """A token's own bytes, exact also for pieces of a character."""
        ...


class SamplingDefaults(Protocol):
    """What the model's own generation_config recommends; None where it is silent."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...


class ModelCard(Protocol):
    """The served base model."""

    @property
    def id(self) -> str: ...
    @property
    def served_names(self) -> tuple[str, ...]: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int:
        """Ids below this are tokens of the model."""
        ...

    @property
    def kv_tokens(self) -> int:
        """How many tokens all running sequences together can hold."""
        ...

    @property
    def family(self) -> str:
        """What the checkpoint calls its kind of model, e.g. llama."""
        ...

    @property
    def num_parameters(self) -> int: ...
    @property
    def num_bytes(self) -> int:
        """Of the weights, as they are computed with."""
        ...

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int:
        """Numbers in a hidden state, and so in a vector of a prompt."""
        ...

    @property
    def created(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantization(self) -> str:
        """none, int8 or int4."""
        ...

    @property
    def device(self) -> str: ...
    @property
    def compute_type(self) -> str:
        """cpu or gpu."""
        ...

    @property
    def fingerprint(self) -> str: ...
    @property
    def sha(self) -> str | None: ...
    @property
    def generation_defaults(self) -> SamplingDefaults: ...

    def is_base(self, name: str | None, /) -> bool:
        """Whether a client that says `name` means the base model: its served names and the common aliases."""
        ...


class TokenStream(Protocol):
    """What one accepted request yields."""

    def __aiter__(self) -> "TokenStream": ...

    async def __anext__(self) -> tuple[TokenEvent, ...]:
        """All that is pending, at least one event; ends after every choice's finish was returned."""
        ...

    def take(self) -> tuple[TokenEvent, ...] | None:
        """The same without waiting: maybe nothing; None at the end."""
        ...

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Have it called by the event loop, soon after something can be taken. None: no more."""
        ...

    def pause(self) -> None:
        """No tokens until `resume`. Synchronous and idempotent, as are the others."""
        ...

    def resume(self) -> None: ...

    def close(self) -> None:
        """Synchronous and idempotent; ends what still runs."""
        ...


class Service(Protocol):
    """Resolve a name, submit a request, read its stream."""

    @property
    def card(self) -> ModelCard: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def registry(self) -> Registry: ...
    @property
    def pool(self) -> Executor: ...
    @property
    def is_alive(self) -> bool: ...

    @property
    def resident(self) -> frozenset[Revision]:
        """The adapters that are on the device."""
        ...

    async def retire(self, name: str, *, force: bool = False, wait_s: float = 0.0) -> Retired | None:
        """Forget a name at once, wait for its requests to end, and with `force` end the rest.

        None: no adapter has it.
        """
        ...

    async def resolve(self, name: str | None, wish: AdapterWish = NO_WISH) -> Lease | None:
        """What `name` means, or what the wish wants instead. None: the base model. Raises: ServeError."""
        ...

    def tokenizer_for(self, lease: Any) -> Tokenizer:
        """What turns texts into ids and back for requests with this lease (None: the base model): the
        adapter's own tokenizer, if it has one; of several adapters, that of the one named first."""
        ...

    def unknown(self, name: str, param: str = "model") -> ServeError:
        """What `resolve` raises for a name that nothing has, said in `param`."""
        ...

    def submit(self, request: GenerationRequest, lease: Any) -> TokenStream:
        """Takes over the lease, which is what `resolve` gave. Raises: Overloaded, Unavailable; then the lease
        is still the caller's."""
        ...


class MetricsSnapshot(Protocol):
    """Numbers about the service, as they were at one moment."""

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, as an Accept header asks. Takes long; from any thread."""
        ...


class Metrics(Protocol):
    """Where numbers about the service are kept."""

    def snapshot(self) -> MetricsSnapshot: ...
