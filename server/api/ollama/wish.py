"""Ollama's two generation routes: bodies to drafts. How answers look is in render.py, what `options`
mean in options.py.

`raw` is the prompt as it stands, everything else goes through the chat template. `context`, which an answer
hands out and the next request may bring back, is put before that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from server.api.http import Endpoint
from server.api.messages import count_chars
from server.api.ollama.endpoint import model_endpoint, model_name
from server.api.ollama.options import (
    MAX_STOP_STRINGS,
    check_options,
    is_zero,
    max_tokens_of,
    sampling_of,
    shortening_of,
    wish_of,
)
from server.api.ollama.render import AnswerForm, OllamaWriter, whole_body
from server.api.ollama.schema import (
    CHAT_NEUTRAL,
    GENERATE_NEUTRAL,
    ChatBody,
    GenerateBody,
    GenerationBody,
    Message,
)
from server.api.ports import ModelCard, Tokenizer
from server.api.records import Accepted, ChatPrompt, Draft, FrameWriter, Prompt, TextPrompt, WholeChoice
from server.api.schema import refuse_unsupported, stop_strings, validate
from server.api.shapes import to_json
from server.api.shortening import Messages
from server.api.state import ApiOptions, ServerState
from server.errors import BadRequest, ContextTooLong


@dataclass(frozen=True, slots=True)
class OllamaWish:
    """`POST /api/generate` and `/api/chat`"""

    body: GenerationBody
    asked_model: str  # as the client wrote it, which answers repeat
    model: str  # as the registry knows it
    is_chat: bool
    is_raw: bool
    text: str  # of a raw prompt
    messages: Messages  # empty with a raw prompt
    before: tuple[int, ...]
    is_unload: bool  # of a load call: that nobody needs the model any longer
    now_ns: Callable[[], int]

    @property
    def is_stream(self) -> bool:
        return self.body.stream is not False

    @property
    def is_load(self) -> bool:
        return not (self.messages or self.text)

    def for_model(self, name: str) -> "OllamaWish":
        return replace(self, model=name)

    def draft(self, card: ModelCard, tokenizer: Tokenizer, options: ApiOptions) -> Draft:
        stop = None if self.body.options is None else self.body.options.stop
        return Draft(
            model=self.model,
            adapter=wish_of(self.body.options, self.model, card),
            prompts=(self._prompt(card, tokenizer.has_chat_template),),
            sampling=sampling_of(self.body, card),
            max_tokens=max_tokens_of(self.body.options),
            is_cut_to_context=True,
            stop=stop_strings(stop, MAX_STOP_STRINGS),
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        return ContextTooLong(
            f"the input length exceeds the context length: it has {num_prompt} tokens, and the context holds "
            f"{limit} with the answer",
            param="messages" if self.is_chat else "prompt",
        )

    def writer(self, accepted: Accepted) -> FrameWriter:
        return OllamaWriter(accepted, self._form())

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        return whole_body(accepted, self._form(), choices[0])

    def load_answer(self) -> bytes:
        return to_json(self._form().whole("", "unload" if self.is_unload else "load"))

    def _form(self) -> AnswerForm:
        has_context = not (self.is_chat or self.is_raw)
        return AnswerForm(self.asked_model, self.is_chat, has_context, self.now_ns)

    def _prompt(self, card: ModelCard, has_template: bool) -> Prompt:
        shortening = shortening_of(self.body, card)
        if self.is_raw:
            return TextPrompt(self.text, shortening=shortening)
        if len(self.before) > card.max_model_len:
            raise BadRequest(f"context: holds more than {card.max_model_len} tokens", param="context")
        if not (has_template or self.is_chat):  # Ollama's own template is nothing but the prompt
            if len(self.messages) > 1:
                raise BadRequest("system: this model has no chat template to put it into", param="system")
            return TextPrompt(str(self.messages[0]["content"]), shortening=shortening, before=self.before)
        is_continued = self.messages[-1]["role"] == "assistant"  # the client has begun the answer
        return ChatPrompt(
            messages=self.messages,
            num_chars=count_chars(self.messages),
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
            shortening=shortening,
            before=self.before,
        )


def generate_endpoint(state: ServerState) -> Endpoint:
    """`POST /api/generate`"""
    return model_endpoint(state, lambda raw: read_generate(raw, state.unix_time_ns))


def chat_endpoint(state: ServerState) -> Endpoint:
    """`POST /api/chat`"""
    return model_endpoint(state, lambda raw: read_chat(raw, state.unix_time_ns))


def read_generate(raw: dict[str, object], now_ns: Callable[[], int]) -> OllamaWish:
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
    name = model_name(body.model)
    return OllamaWish(
        body=body,
        asked_model=name,
        model=name,
        is_chat=False,
        is_raw=is_raw,
        text=(body.prompt or "") if is_raw else "",
        messages=tuple(messages),
        before=tuple(body.context or ()),
        is_unload=is_zero(body.keep_alive),
        now_ns=now_ns,
    )


def read_chat(raw: dict[str, object], now_ns: Callable[[], int]) -> OllamaWish:
    """Raises: BadRequest. All that takes long for a long conversation is done here, off the event loop."""
    refuse_unsupported(raw, CHAT_NEUTRAL)
    check_options(raw.get("options"))
    body = validate(ChatBody, raw)
    name = model_name(body.model)
    return OllamaWish(
        body=body,
        asked_model=name,
        model=name,
        is_chat=True,
        is_raw=False,
        text="",
        messages=tuple(_template_message(i, message) for i, message in enumerate(body.messages or ())),
        before=(),
        is_unload=is_zero(body.keep_alive),
        now_ns=now_ns,
    )


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
