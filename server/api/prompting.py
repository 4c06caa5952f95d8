"""Messages, text or ids to the ids that the engine takes, and the checks of their number and length.

Short texts are tokenised where they are, long ones in the pool, so that no prompt holds up other people's
tokens. A text that could not fit even if all its tokens were the longest ones is refused before any work is
done on it.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import TypeVar

from server.api.ports import ModelCard, Service, Tokenizer
from server.api.records import ChatPrompt, Draft, Prompt, TextPrompt, TokenisedPrompt, TokenPrompt, Wish
from server.api.shortening import Messages, clipped, fit_turns, shortened
from server.api.state import ApiOptions
from server.errors import BadRequest, ContextTooLong, TemplateFailed
from server.types import StopCriteria

# Tokenising runs at 2 to 5 characters a microsecond, so this much takes about a millisecond.
_INLINE_CHARS = 3000
_MESSAGE_CHARS = 100  # what a template does for a message counts as much as this many characters

T = TypeVar("T")


def check_draft(service: Service, draft: Draft, options: ApiOptions, wish: Wish) -> None:
    """Refuse what is too much or cannot fit, before any work is done on it or anything is held for it.

    Raises: BadRequest for more choices than one request may have; ContextTooLong.
    """
    check_num_prompts(len(draft.prompts), options, draft.prompts[0].param, draft.n)
    limit = service.card.max_model_len
    for prompt in draft.prompts:
        if not isinstance(prompt, TokenPrompt):
            if prompt.shortening is None:
                check_chars(_num_chars(prompt), limit, service.tokenizer, prompt.param)
        elif len(prompt.ids) > limit - _least_room(draft):
            raise wish.too_long(limit, len(prompt.ids), None)


def check_num_prompts(num_prompts: int, options: ApiOptions, param: str | None, n: int = 1) -> None:
    """Raises: BadRequest for more choices than one request may have."""
    if num_prompts * n > options.max_prompts:
        asked = f"{num_prompts} prompts" + (f" with n = {n} for each" if n > 1 else "")
        raise BadRequest(f"{asked}: one request can have {options.max_prompts} answers at most", param=param)


def check_chars(num_chars: int, limit: int, tokenizer: Tokenizer, param: str | None = None) -> None:
    """Raises: ContextTooLong for more characters than `limit` tokens can stand for."""
    most = limit * tokenizer.max_token_chars
    if num_chars > most:
        raise ContextTooLong(
            f"the prompt has {num_chars} characters, and a context of {limit} tokens holds "
            f"no more than {most}",
            param=param,
        )


async def tokenise_prompts(
    service: Service, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> tuple[TokenisedPrompt, ...]:
    """The ids and texts of prompts of checked size. Raises: BadRequest, ContextTooLong."""

    def tokenise() -> tuple[TokenisedPrompt, ...]:
        return tuple(_tokenise(service.card, tokenizer, prompt) for prompt in prompts)

    if any(isinstance(prompt, ChatPrompt) for prompt in prompts):
        return await run_for_chat(service, tokenizer, sum(map(text_work, prompts)), tokenise)
    return await run_for_text(service.pool, sum(map(text_work, prompts)), tokenise)


def stop_criteria(
    draft: Draft, prompts: Sequence[TokenisedPrompt], limit: int, options: ApiOptions, wish: Wish
) -> StopCriteria:
    """When to stop, with max_tokens settled: as asked, or the usual number, within what the context leaves to
    the shortest prompt; the others' choices end earlier where their context does.

    Raises: ContextTooLong in the protocol's words for what the longest prompt leaves no room for; BadRequest
    for a min_tokens that max_tokens does not allow.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    room = limit - longest
    is_too_much = draft.max_tokens is not None and draft.max_tokens > room and not draft.is_cut_to_context
    if room < _least_room(draft) or is_too_much:
        raise wish.too_long(limit, longest, draft.max_tokens if room >= 1 else None)
    max_tokens = 0 if draft.pooling is not None else draft.max_tokens
    if max_tokens is not None:
        max_tokens = min(max_tokens, room)
    if max_tokens is None:
        most = limit - min(len(prompt.ids) for prompt in prompts)
        max_tokens = min(options.default_max_tokens or draft.usual_max_tokens or most, most)
    if draft.min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens ({draft.min_tokens}) must not be larger than max_tokens ({max_tokens})",
            param="min_tokens",
        )
    return StopCriteria(
        max_tokens=max_tokens,
        min_tokens=draft.min_tokens,
        stop=draft.stop,
        stop_token_ids=draft.stop_token_ids,
        ignore_eos=draft.ignore_eos,
        keep_stop=draft.keep_stop,
    )


def check_ids(ids: tuple[int, ...] | list[int], vocab_size: int, param: str) -> None:
    """Raises: BadRequest for an id that is no token's."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise BadRequest(
                f"{param}: {token_id} is not a token id (the vocabulary has {vocab_size})", param=param
            )


def chat_text(prompt: ChatPrompt, tokenizer: Tokenizer, limit: int) -> str:
    """The messages as the model's chat template writes them. Raises: TemplateFailed, ContextTooLong."""
    if not tokenizer.has_chat_template:
        raise TemplateFailed("this model has no chat template; use /v1/completions", param="messages")
    text = tokenizer.render_chat(
        list(prompt.messages),
        add_generation_prompt=prompt.add_generation_prompt,
        continue_final_message=prompt.continue_final_message,
    )
    if prompt.shortening is None:
        check_chars(len(text), limit, tokenizer, prompt.param)  # a template may repeat what it is given
    return text


async def run_for_text(pool: Executor, num_chars: int, work: Callable[[], T]) -> T:
    """Do work that goes through so many characters: here if they are few, else in the pool."""
    if num_chars <= _INLINE_CHARS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(pool, work)


async def run_for_chat(service: Service, tokenizer: Tokenizer, num_chars: int, work: Callable[[], T]) -> T:
    """As `run_for_text`, for work that renders a chat: some tokenizers wait for that."""
    if tokenizer.chat_pool is None:
        return await run_for_text(service.pool, num_chars, work)
    return await asyncio.get_running_loop().run_in_executor(tokenizer.chat_pool, work)


def text_work(prompt: Prompt) -> int:
    """What tokenising a prompt takes, in characters of plain text."""
    if isinstance(prompt, TokenPrompt):
        return len(prompt.ids)
    messages = len(prompt.messages) if isinstance(prompt, ChatPrompt) else 0
    return _num_chars(prompt) + _MESSAGE_CHARS * messages + len(prompt.before)


def _least_room(draft: Draft) -> int:
    """How many tokens of the context each prompt must leave free."""
    return 0 if draft.pooling is not None or draft.max_tokens == 0 else 1


def _num_chars(prompt: TextPrompt | ChatPrompt) -> int:
    return prompt.num_chars if isinstance(prompt, ChatPrompt) else len(prompt.text)


def _tokenise(card: ModelCard, tokenizer: Tokenizer, prompt: Prompt) -> TokenisedPrompt:
    if isinstance(prompt, TokenPrompt):
        tokenised = _from_ids(prompt, tokenizer)
    elif isinstance(prompt, ChatPrompt) and (prompt.needs_template or tokenizer.has_chat_template):
        tokenised = _from_chat(prompt, tokenizer, card.max_model_len)
    elif isinstance(prompt, ChatPrompt):
        tokenised = _from_text(_plain_prompt(prompt), tokenizer)
    else:
        tokenised = _from_text(prompt, tokenizer)
    if max(tokenised.ids) >= card.vocab_size:  # some tokenizers know tokens that their model does not
        raise BadRequest("the prompt holds a token that the model does not know", param=prompt.param)
    return tokenised


def _from_text(prompt: TextPrompt, tokenizer: Tokenizer) -> TokenisedPrompt:
    text = clipped(prompt.text, prompt.shortening, tokenizer.max_token_chars)
    ids = tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens and not prompt.before)
    whole = _continued(prompt.before, TokenisedPrompt(tuple(ids), prompt.text), tokenizer)
    return _kept(shortened(whole.ids, prompt.shortening), prompt, whole.text)


def _from_chat(prompt: ChatPrompt, tokenizer: Tokenizer, limit: int) -> TokenisedPrompt:
    def tokenise(messages: Messages) -> TokenisedPrompt:
        text = chat_text(replace(prompt, messages=messages), tokenizer, limit)
        short = clipped(text, prompt.shortening, tokenizer.max_token_chars)
        ids = tokenizer.encode(short, add_special_tokens=prompt.add_special_tokens)
        return _continued(prompt.before, TokenisedPrompt(tuple(ids), text), tokenizer)

    whole = fit_turns(prompt.messages, tokenise, prompt.shortening)
    return _kept(shortened(whole.ids, prompt.shortening), prompt, whole.text)


def _plain_prompt(prompt: ChatPrompt) -> TextPrompt:
    """What is left of a chat without a template. Raises: BadRequest for more than the prompt itself."""
    if len(prompt.messages) > 1:
        raise BadRequest("system: this model has no chat template to put it into", param="system")
    text = str(prompt.messages[0]["content"])
    return TextPrompt(text, shortening=prompt.shortening, before=prompt.before)


def _continued(before: tuple[int, ...], prompt: TokenisedPrompt, tokenizer: Tokenizer) -> TokenisedPrompt:
    if not before:
        return prompt
    check_ids(before, tokenizer.vocab_size, "context")
    text = tokenizer.decode(before, skip_special_tokens=False) + prompt.text
    return TokenisedPrompt(before + prompt.ids, text)


def _from_ids(prompt: TokenPrompt, tokenizer: Tokenizer) -> TokenisedPrompt:
    check_ids(prompt.ids, tokenizer.vocab_size, prompt.param)
    return TokenisedPrompt(prompt.ids, tokenizer.decode(prompt.ids, skip_special_tokens=False))


def _kept(ids: Sequence[int], prompt: TextPrompt | ChatPrompt, text: str) -> TokenisedPrompt:
    if not ids:
        raise BadRequest("the prompt is empty", param=prompt.param)
    return TokenisedPrompt(tuple(ids if prompt.keep_last is None else ids[-prompt.keep_last :]), text)
