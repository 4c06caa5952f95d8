"""Ollama's two generation routes: bodies to drafts. How answers look is in ollama_render.py, what `options`
mean in ollama_options.py.

A request without a prompt, or without messages, loads its model: the adapter is fetched and the answer says
so, at once and in one piece. `raw` is the prompt as it stands, everything else goes through the chat
template. `context`, which an answer hands out and the next request may bring back, is put before that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.api.generation import generate, hold_adapter, read_json
from server.api.http import Endpoint, Exchange
from server.api.json_body import check_tolerated_type
from server.api.messages import count_chars
from server.api.names import without_tag
from server.api.ollama_options import (
    MAX_STOP_STRINGS,
    check_options,
    is_zero,
    max_tokens_of,
    sampling_of,
    shortening_of,
)
from server.api.ollama_render import AnswerForm, OllamaWriter, whole_body
from server.api.ollama_schema import (
    CHAT_NEUTRAL,
    GENERATE_NEUTRAL,
    ChatBody,
    GenerateBody,
    GenerationBody,
    Message,
)
from server.api.ports import ModelCard, Service, Tokenizer
from server.api.records import Accepted, ChatPrompt, Draft, FrameWriter, Prompt, TextPrompt, WholeChoice
from server.api.schema import refuse_unsupported, stop_strings, validate
from server.api.shapes import to_json
from server.api.shortening import Messages
from server.api.state import ApiOptions, ServerState
from server.api.streaming import while_connected
from server.errors import BadRequest, ContextTooLong, ModelNotFound


@dataclass(frozen=True, slots=True)
class Asked:
    """A body of one of the two routes, read and checked; not yet with the name that the registry knows."""

    body: GenerationBody
    model: str  # as the client wrote it
    is_raw: bool
    text: str  # of a raw prompt
    messages: Messages  # empty with a raw prompt
    before: tuple[int, ...]
    is_chat: bool
    is_unload: bool  # if it is a load call: a model that nobody needs any longer

    @property
    def is_load(self) -> bool:
        return not (self.messages or self.text)


@dataclass(frozen=True, slots=True)
class OllamaWish:
    """`POST /api/generate` and `/api/chat`"""

    asked: Asked
    model: str  # as the registry knows it
    now_ns: Callable[[], int]

    @property
    def is_stream(self) -> bool:
        return self.asked.body.stream is not False

    def draft(self, card: ModelCard, tokenizer: Tokenizer, options: ApiOptions) -> Draft:
        body = self.asked.body
        stop = None if body.options is None else body.options.stop
        return Draft(
            model=self.model,
            prompts=(self._prompt(card, tokenizer),),
            sampling=sampling_of(body, card),
            max_tokens=max_tokens_of(body.options),
            is_cut_to_context=True,
            stop=stop_strings(stop, MAX_STOP_STRINGS),
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        return ContextTooLong(
            f"the input length exceeds the context length: it has {num_prompt} tokens, and the context holds "
            f"{limit} with the answer",
            param="messages" if self.asked.is_chat else "prompt",
        )

    def writer(self, accepted: Accepted) -> FrameWriter:
        return OllamaWriter(accepted, self._form())

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        return whole_body(accepted, self._form(), choices[0])

    def load_answer(self) -> bytes:
        """What a request without a prompt is answered."""
        return to_json(self._form().whole("", "unload" if self.asked.is_unload else "load"))

    def _form(self) -> AnswerForm:
        has_context = not (self.asked.is_chat or self.asked.is_raw)
        return AnswerForm(self.asked.model, self.asked.is_chat, has_context, self.now_ns)

    def _prompt(self, card: ModelCard, tokenizer: Tokenizer) -> Prompt:
        asked, shortening = self.asked, shortening_of(self.asked.body, card)
        if asked.is_raw:
            return TextPrompt(asked.text, shortening=shortening)
        if len(asked.before) > card.max_model_len:
            raise BadRequest(f"context: holds more than {card.max_model_len} tokens", param="context")
        is_continued = asked.messages[-1]["role"] == "assistant"  # the client has begun the answer
        return ChatPrompt(
            messages=asked.messages,
            num_chars=count_chars(asked.messages),
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
            shortening=shortening,
            before=asked.before,
        )


def generate_endpoint(state: ServerState) -> Endpoint:
    """`POST /api/generate`"""
    return _endpoint(state, read_generate)


def chat_endpoint(state: ServerState) -> Endpoint:
    """`POST /api/chat`"""
    return _endpoint(state, read_chat)


def read_generate(raw: dict[str, object]) -> Asked:
    """Raises: BadRequest."""
    refuse_unsupported(raw, GENERATE_NEUTRAL)
    check_options(raw.get("options"))
    body = validate(GenerateBody, raw)
    is_raw = bool(body.raw)
    if is_raw and (body.system or body.context):
        raise BadRequest("raw mode does not support template, system, or context", param="raw")
    messages: list[dict[str, object]] = []
    if body.prompt and not is_raw:
        if body.system:
            messages.append({"role": "system", "content": body.system})
        messages.append({"role": "user", "content": body.prompt})
    return Asked(
        body=body,
        model=model_name(body.model),
        is_raw=is_raw,
        text=(body.prompt or "") if is_raw else "",
        messages=tuple(messages),
        before=tuple(body.context or ()),
        is_chat=False,
        is_unload=is_zero(body.keep_alive),
    )


def read_chat(raw: dict[str, object]) -> Asked:
    """Raises: BadRequest. All that takes long for a long conversation is done here, off the event loop."""
    refuse_unsupported(raw, CHAT_NEUTRAL)
    check_options(raw.get("options"))
    body = validate(ChatBody, raw)
    messages = tuple(_template_message(i, message) for i, message in enumerate(body.messages or ()))
    return Asked(
        body=body,
        model=model_name(body.model),
        is_raw=False,
        text="",
        messages=messages,
        before=(),
        is_chat=True,
        is_unload=is_zero(body.keep_alive),
    )


def model_name(name: str | None) -> str:
    """The name that every request of Ollama's clients has to bring. Raises: BadRequest."""
    if name is None:
        raise BadRequest("model is required", param="model")
    return name


def not_found(name: str) -> ModelNotFound:
    """In the words that Ollama's clients look for."""
    return ModelNotFound(f"model '{name}' not found", param="model")


def _endpoint(state: ServerState, read: Callable[[dict[str, object]], Asked]) -> Endpoint:
    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        check_tolerated_type(exchange.header(b"content-type"))
        raw = await exchange.read_body(state.options.max_body_bytes)
        state.num_active += 1
        try:
            asked = await read_json(service, raw, read)
            del raw  # not kept while the answer runs
            wish = OllamaWish(asked, without_tag(asked.model, service), state.unix_time_ns)
            answer = _load if asked.is_load else generate
            await while_connected(exchange, answer(state, service, exchange, wish))
        except ModelNotFound:
            raise not_found(asked.model) from None
        finally:
            state.num_active -= 1

    return endpoint


async def _load(state: ServerState, service: Service, exchange: Exchange, wish: OllamaWish) -> None:
    """Fetch the adapter, and say so. Nothing is ever unloaded on a client's wish: others may use it."""
    lease = await hold_adapter(state, service, exchange, wish.model)
    if lease is not None:
        lease.release()
    await exchange.answer(wish.load_answer())


def _template_message(index: int, message: Message) -> dict[str, object]:
    """What chat templates expect. Raises: BadRequest for a message with images."""
    if message.images:
        where = f"messages[{index}].images"
        raise BadRequest(f"{where}: images are not supported, only text", param=where)
    result: dict[str, object] = {"role": message.role, "content": message.content or ""}
    if message.thinking:
        result["thinking"] = message.thinking
    if message.tool_calls:
        result["tool_calls"] = message.tool_calls
    if message.tool_name is not None:
        result["name"] = message.tool_name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result
