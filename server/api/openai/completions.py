"""OpenAI's text completions: bodies to drafts. The answers are in completions_render.py.

A request may bring many prompts; each is answered by `n` choices, numbered prompt by prompt. With `echo` the
text of a choice begins with its prompt, and `logprobs` then cover the prompt too; `max_tokens` 0 asks about
the prompt alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.http import Exchange
from server.api.openai.completions_render import CompletionRender
from server.api.openai.drafts import context_too_long, draft_of, render_options, wants_stream
from server.api.openai.prompt_values import read_prompts
from server.api.openai.render import OpenAIWriter, whole_body
from server.api.openai.schema import COMPLETION_NEUTRAL, CompletionBody
from server.api.ports import ModelCard
from server.api.records import Accepted, Draft, FrameWriter, TextPrompt, TokenPrompt, WholeChoice
from server.api.schema import refuse_unsupported, validate
from server.api.state import ApiOptions
from server.errors import BadRequest, ContextTooLong

_USUAL_MAX_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True, slots=True)
class CompletionWish:
    """`POST /v1/completions`"""

    body: CompletionBody
    prompts: tuple[TextPrompt | TokenPrompt, ...]
    is_stream: bool

    def draft(self, card: ModelCard, options: ApiOptions) -> Draft:
        body = self.body
        about_prompt = (body.prompt_logprobs, body.logprobs if body.echo else None)
        return draft_of(
            body,
            self.prompts,
            card,
            options,
            num_logprobs=body.logprobs,
            num_prompt_logprobs=max((count for count in about_prompt if count is not None), default=None),
            max_tokens=body.max_tokens,
            usual_max_tokens=_USUAL_MAX_TOKENS,
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        return context_too_long("prompt", limit, num_prompt, max_tokens)

    def writer(self, accepted: Accepted) -> FrameWriter:
        return OpenAIWriter(accepted, self._render(accepted), render_options(self.body))

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        return whole_body(accepted, self._render(accepted), choices)

    def _render(self, accepted: Accepted) -> CompletionRender:
        body = self.body
        return CompletionRender(accepted, is_echo=bool(body.echo), num_prompt_logprobs=body.prompt_logprobs)


def read_completion(raw: dict[str, object], exchange: Exchange) -> CompletionWish:
    """Raises: BadRequest. As `read_chat`."""
    refuse_unsupported(raw, COMPLETION_NEUTRAL)
    body = validate(CompletionBody, raw)
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise BadRequest("max_tokens must be at least 1, unless echo is true", param="max_tokens")
    prompts = read_prompts(body.prompt, "prompt", add_special_tokens=body.add_special_tokens is not False)
    return CompletionWish(body, prompts, wants_stream(body, exchange))
