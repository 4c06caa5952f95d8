"""OpenAI's `/v1/responses`: bodies to drafts. How answers look is in render.py, and what becomes of
them afterwards in kept.py.

A request may continue a response that the server has kept: its prompt is then that conversation and its own
input, under instructions that are its own as well. Sampling fields and their defaults are those of the other
OpenAI routes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.finishes import text_to_json
from server.api.generation import ReadWish
from server.api.http import Exchange
from server.api.messages import texts_of
from server.api.openai.drafts import context_too_long, draft_of, wants_stream
from server.api.ports import ModelCard
from server.api.records import Accepted, ChatPrompt, Draft, FrameWriter, WholeChoice
from server.api.responses.conversations import Conversation, Item, KeptResponse
from server.api.responses.render import ResponseRender, ResponsesWriter
from server.api.responses.schema import (
    ABSENT_PARTS,
    NEUTRAL,
    REASONING_NEUTRAL,
    TEXT_NEUTRAL,
    ItemBody,
    ResponsesBody,
)
from server.api.schema import refuse_members, refuse_unsupported, validate
from server.api.shapes import shown
from server.api.state import ApiOptions, ServerState
from server.errors import BadRequest, ContextTooLong, PreviousResponseNotFound

_PARTS = ("input_text", "output_text", "text")


@dataclass(frozen=True, slots=True)
class ResponsesWish:
    """`POST /v1/responses`"""

    body: ResponsesBody
    number: str  # what the ids of the response and of its items are made of
    owner: str
    conversation: Conversation  # up to and with this request's input
    state: ServerState
    is_stream: bool

    def draft(self, card: ModelCard, options: ApiOptions) -> Draft:
        return draft_of(
            self.body,
            (self._prompt(),),
            card,
            options,
            num_logprobs=None,
            max_tokens=self.body.max_output_tokens,
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        return context_too_long("input", limit, num_prompt, max_tokens)

    def writer(self, accepted: Accepted) -> FrameWriter:
        options = self.body.stream_options
        return ResponsesWriter(
            self._render(accepted),
            self._keep,
            has_obfuscation=options is not None and bool(options.include_obfuscation),
        )

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        finish = choices[0].finish
        response = self._render(accepted).ended(finish, text_to_json(finish.generated_text))
        self._keep(finish.generated_text, response)
        return response.encode("utf-8")

    @property
    def _id(self) -> str:
        return f"resp_{self.number}"

    @property
    def _item_id(self) -> str:
        return _item_id(self.number, "answer")

    def _prompt(self) -> ChatPrompt:
        instructions = self.body.instructions
        if not instructions:
            return ChatPrompt(self.conversation.messages, self.conversation.num_chars)
        message: dict[str, object] = {"role": "system", "content": instructions}
        return ChatPrompt(
            (message, *self.conversation.messages), self.conversation.num_chars + len(instructions)
        )

    def _render(self, accepted: Accepted) -> ResponseRender:
        return ResponseRender(accepted, self.body, self._id, self._item_id, self.state.unix_time)

    def _keep(self, text: str, response: str) -> None:
        if self.body.store is False:
            return
        answer = Item(self._item_id, "assistant", (text,))
        kept = KeptResponse(
            id=self._id,
            body=response.encode("utf-8"),
            conversation=self.conversation.and_then(answer) if text else self.conversation,
            num_inputs=len(self.conversation.items),
        )
        self.state.responses.put(self.owner, kept)


def responses_reader(state: ServerState) -> ReadWish:
    """Reads bodies for a server that keeps its responses in this state."""

    def read(raw: dict[str, object], exchange: Exchange) -> ResponsesWish:
        refuse_unsupported(raw, NEUTRAL)
        refuse_members(raw, "reasoning", REASONING_NEUTRAL)
        refuse_members(raw, "text", TEXT_NEUTRAL)
        body = validate(ResponsesBody, raw)
        check_include(body.include or ())
        owner, number = exchange.caller.digest, state.new_id()
        before = _continued(body.previous_response_id, owner, state)
        return ResponsesWish(
            body=body,
            number=number,
            owner=owner,
            conversation=before.and_then(*_items(body.input, number)),
            state=state,
            is_stream=wants_stream(body, exchange),
        )

    return read


def check_include(parts: Sequence[str]) -> None:
    """Raises: BadRequest for parts that an answer could have, and does not."""
    for part in parts:
        if part not in ABSENT_PARTS:
            raise BadRequest(
                f"include: {shown(part, 'this')} is not supported by this server", param="include"
            )


def _continued(id: str | None, owner: str, state: ServerState) -> Conversation:
    if id is None:
        return Conversation()
    kept = state.responses.get(owner, id)
    if kept is None:
        raise PreviousResponseNotFound(
            "previous_response_id: there is no such response (responses are kept in memory, and the oldest "
            "go first)",
            param="previous_response_id",
        )
    return kept.conversation


def _items(given: str | list[dict[str, object]], number: str) -> list[Item]:
    """Raises: BadRequest that names the item."""
    if isinstance(given, str):
        return [Item(_item_id(number, 0), "user", (given,))]
    return [_item(item, i, number) for i, item in enumerate(given)]


def _item(item: dict[str, object], position: int, number: str) -> Item:
    where = f"input[{position}]"
    kind = item.get("type")
    if kind not in (None, "message"):
        raise BadRequest(
            f"{where}: {shown(kind, 'these')} items are not supported, only messages", param=f"{where}.type"
        )
    message = validate(ItemBody, item, where)
    if message.content is None:
        raise BadRequest(
            f"{where}.content: input should be a string or a list of parts", param=f"{where}.content"
        )
    texts = texts_of(message.content, f"{where}.content", _PARTS)
    return Item(_item_id(number, position), message.role, texts)


def _item_id(number: str, position: int | str) -> str:
    return f"msg_{number}_{position}"
