"""Anthropic's Messages routes: bodies to drafts. How answers look is in render.py.

Three things differ from OpenAI's chat: `system` stands beside the messages, a last message of the assistant's
is the beginning of the answer, which goes on from there, and `max_tokens`, which every request must bring, is
an upper bound: where the context leaves less, less is generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.anthropic.render import MessageWriter, whole_message
from server.api.anthropic.schema import NEUTRAL, CountBody, MessagesBody
from server.api.defaults import first_given
from server.api.generation import held_tokenizer, read_json
from server.api.http import Endpoint, Exchange
from server.api.json_body import check_json_type
from server.api.messages import count_chars, texts_of
from server.api.openai.drafts import context_too_long
from server.api.ports import ModelCard
from server.api.prompting import check_draft, tokenise_prompts
from server.api.records import Accepted, ChatPrompt, Draft, FrameWriter, WholeChoice
from server.api.schema import refuse_unsupported, stop_strings, validate
from server.api.shapes import to_json
from server.api.state import ApiOptions, ServerState
from server.errors import BadRequest, ContextTooLong
from server.types import SamplingParams

_MAX_STOP_SEQUENCES = 64
_PARTS = ("text",)


@dataclass(frozen=True, slots=True)
class MessagesWish:
    """`POST /v1/messages`"""

    body: MessagesBody
    prompt: ChatPrompt
    stop: tuple[str, ...]
    is_stream: bool

    def draft(self, card: ModelCard, options: ApiOptions) -> Draft:
        return Draft(
            model=self.body.model,
            prompts=(self.prompt,),
            sampling=_sampling(self.body, card),
            max_tokens=self.body.max_tokens,
            is_cut_to_context=True,
            stop=self.stop,
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        return context_too_long("messages", limit, num_prompt, None)

    def writer(self, accepted: Accepted) -> FrameWriter:
        return MessageWriter(accepted, self.body.max_tokens)

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        return whole_message(accepted, choices[0], self.body.max_tokens)


def read_messages(raw: dict[str, object], exchange: Exchange) -> MessagesWish:
    """Raises: BadRequest."""
    refuse_unsupported(raw, NEUTRAL)
    body = validate(MessagesBody, raw)
    stop = stop_strings(body.stop_sequences, _MAX_STOP_SEQUENCES, "stop_sequences")
    return MessagesWish(body, _prompt(body), stop, bool(body.stream))


def count_tokens_endpoint(state: ServerState) -> Endpoint:
    """`POST /v1/messages/count_tokens`: the tokens that the prompt of such a request would have."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        check_json_type(exchange.header(b"content-type"))
        raw = await exchange.read_body(state.options.max_body_bytes)
        wish = await read_json(service, raw, _read_count)
        draft = wish.draft(service.card, state.options)
        check_draft(service, draft, state.options, wish)
        async with held_tokenizer(state, service, exchange, draft.model, draft.adapter) as tokenizer:
            (prompt,) = await tokenise_prompts(service, tokenizer, (wish.prompt,))
        await exchange.answer(to_json({"input_tokens": len(prompt.ids)}))

    return endpoint


def _read_count(raw: dict[str, object]) -> MessagesWish:
    """A request for as many tokens as there would be without one. Raises: BadRequest."""
    refuse_unsupported(raw, NEUTRAL)
    counted = validate(CountBody, raw)
    body = MessagesBody(model=counted.model, messages=counted.messages, system=counted.system, max_tokens=1)
    return MessagesWish(body, _prompt(counted), (), is_stream=False)


def _prompt(body: CountBody) -> ChatPrompt:
    messages: list[dict[str, object]] = [
        {"role": turn.role, "content": _text(turn.content, f"messages[{i}].content")}
        for i, turn in enumerate(body.messages)
    ]
    if body.system is not None:
        messages.insert(0, {"role": "system", "content": _text(body.system, "system")})
    is_begun = body.messages[-1].role == "assistant"
    return ChatPrompt(
        messages=tuple(messages),
        num_chars=count_chars(messages),
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
    )


def _text(content: object, where: str) -> str:
    """A string or blocks of text. Raises: BadRequest that names the block."""
    if content is None:
        raise BadRequest(f"{where}: input should be a string or a list of blocks", param=where)
    return "".join(texts_of(content, where, _PARTS))


def _sampling(body: MessagesBody, card: ModelCard) -> SamplingParams:
    usual = card.generation_defaults
    return SamplingParams(
        temperature=first_given(body.temperature, usual.temperature, 1.0),
        top_k=first_given(body.top_k, usual.top_k, 0),
        top_p=first_given(body.top_p, usual.top_p, 1.0),
        min_p=first_given(None, usual.min_p, 0.0),
        repetition_penalty=first_given(None, usual.repetition_penalty, 1.0),
    )
