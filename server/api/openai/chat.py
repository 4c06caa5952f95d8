"""OpenAI's chat: bodies to drafts. How answers look is in render.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.http import Exchange
from server.api.messages import count_chars, template_message
from server.api.openai.drafts import context_too_long, draft_of, render_options, wants_stream
from server.api.openai.render import ChatRender, OpenAIWriter, whole_body
from server.api.openai.schema import (
    CHAT_NEUTRAL,
    ChatBody,
)
from server.api.ports import ModelCard
from server.api.records import (
    Accepted,
    ChatPrompt,
    Draft,
    FrameWriter,
    WholeChoice,
)
from server.api.schema import refuse_unsupported, validate
from server.api.state import ApiOptions
from server.errors import BadRequest, ContextTooLong


@dataclass(frozen=True, slots=True)
class ChatWish:
    """`POST /v1/chat/completions`"""

    body: ChatBody
    prompt: ChatPrompt
    is_stream: bool

    def draft(self, card: ModelCard, options: ApiOptions) -> Draft:
        body = self.body
        return draft_of(
            body,
            (self.prompt,),
            card,
            options,
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            num_prompt_logprobs=body.prompt_logprobs,
            max_tokens=body.max_completion_tokens or body.max_tokens,
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        return context_too_long("messages", limit, num_prompt, max_tokens)

    def writer(self, accepted: Accepted) -> FrameWriter:
        return OpenAIWriter(accepted, self._render(accepted), render_options(self.body))

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        return whole_body(accepted, self._render(accepted), choices)

    def _render(self, accepted: Accepted) -> ChatRender:
        return ChatRender(
            accepted,
            has_tier=self.body.service_tier is not None,
            num_prompt_logprobs=self.body.prompt_logprobs,
        )


def read_chat(raw: dict[str, object], exchange: Exchange) -> ChatWish:
    """Raises: BadRequest. All that takes long for a long conversation is done here, off the event loop."""
    refuse_unsupported(raw, CHAT_NEUTRAL)
    body = validate(ChatBody, raw)
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if body.continue_final_message and body.add_generation_prompt is not False:
        raise BadRequest(
            "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
        )
    messages = tuple(template_message(i, message) for i, message in enumerate(body.messages))
    prompt = ChatPrompt(
        messages=messages,
        num_chars=count_chars(messages),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
    )
    return ChatWish(body, prompt, wants_stream(body, exchange))
