"""Routes about tokens, without a model: a text or a chat to its tokens (LoRAX's and TGI's), ids back to text
(vLLM's).

Offsets are in characters and the texts of tokens are pieces of what was sent, as TGI has it; special tokens
that the tokenizer adds stand for no piece and are empty. A body may name an adapter, for one may have tokens
and a chat template of its own.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

from server.api.generation import held_tokenizer, read_json
from server.api.http import Endpoint, Exchange
from server.api.json_body import check_tolerated_type
from server.api.names import name_of_two
from server.api.openai.chat import read_chat
from server.api.ports import Service, Tokenizer, TokenSpan
from server.api.prompting import (
    chat_text,
    check_chars,
    check_ids,
    run_for_chat,
    run_for_text,
    text_work,
)
from server.api.records import ChatPrompt
from server.api.schema import validate
from server.api.shapes import long_json_text
from server.api.state import ServerState
from server.api.tgi.schema import DetokenizeBody, TokenizeBody
from server.errors import BadRequest, ContextTooLong
from server.wishes import NO_WISH, AdapterWish


def tokenize_endpoint(state: ServerState) -> Endpoint:
    """`POST /tokenize`: a list of {id, text, start, stop}."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        raw = await _read(state, exchange)
        body = await read_json(service, raw, lambda value: validate(TokenizeBody, value))
        check_chars(len(body.inputs), service.card.max_model_len, service.tokenizer)
        has_special = body.add_special_tokens is not False
        name = name_of_two(body.model, body.adapter_id, service.card)
        async with _tokenizer(state, service, exchange, name) as tokenizer:

            def tokenise() -> bytes:
                spans = tokenizer.encode_with_offsets(body.inputs, add_special_tokens=has_special)
                return long_json_text(_listed(spans)).encode("ascii")

            answer = await run_for_text(service.pool, len(body.inputs), tokenise)
        await exchange.answer(answer)

    return endpoint


def chat_tokenize_endpoint(state: ServerState) -> Endpoint:
    """`POST /chat_tokenize`: the body of a chat; its prompt as text and as tokens."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        raw = await _read(state, exchange)
        wish = await read_json(service, raw, lambda value: read_chat(value, exchange))
        prompt = wish.prompt
        limit = service.card.max_model_len
        check_chars(prompt.num_chars, limit, service.tokenizer)
        draft = wish.draft(service.card, state.options)
        async with _tokenizer(state, service, exchange, draft.model, draft.adapter) as tokenizer:
            answer = await run_for_chat(
                service, tokenizer, text_work(prompt), lambda: _chat_tokens(tokenizer, limit, prompt)
            )
        await exchange.answer(answer)

    return endpoint


def detokenize_endpoint(state: ServerState) -> Endpoint:
    """`POST /detokenize`: {tokens: [id, …]} to {prompt: text}, special tokens spelled out."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        raw = await _read(state, exchange)
        body = await read_json(service, raw, lambda value: validate(DetokenizeBody, value))
        name = name_of_two(body.model, body.adapter_id, service.card)
        async with _tokenizer(state, service, exchange, name) as tokenizer:
            ids = _checked_ids(body.tokens, tokenizer, service.card.max_model_len)

            def detokenise() -> bytes:
                text = tokenizer.decode(ids, skip_special_tokens=False)
                return long_json_text({"prompt": text}).encode("ascii")

            answer = await run_for_text(service.pool, len(ids), detokenise)
        await exchange.answer(answer)

    return endpoint


async def _read(state: ServerState, exchange: Exchange) -> bytes:
    check_tolerated_type(exchange.header(b"content-type"))
    return await exchange.read_body(state.options.max_body_bytes)


def _tokenizer(
    state: ServerState, service: Service, exchange: Exchange, name: str | None, wish: AdapterWish = NO_WISH
) -> AbstractAsyncContextManager[Tokenizer]:
    """Of the model that a body names. One that names none asks about no model, and the base's answers
    whoever asks.
    """
    if name is None and wish == NO_WISH:
        return nullcontext(service.tokenizer)
    return held_tokenizer(state, service, exchange, name, wish)


def _chat_tokens(tokenizer: Tokenizer, limit: int, prompt: ChatPrompt) -> bytes:
    text = chat_text(prompt, tokenizer, limit)
    spans = tokenizer.encode_with_offsets(text, add_special_tokens=prompt.add_special_tokens)
    answer = {"tokenize_response": _listed(spans), "templated_text": text}
    return long_json_text(answer).encode("ascii")


def _listed(spans: Sequence[TokenSpan]) -> list[dict[str, object]]:
    return [{"id": s.id, "text": s.text, "start": s.start, "stop": s.stop} for s in spans]


def _checked_ids(tokens: object, tokenizer: Tokenizer, limit: int) -> list[int]:
    """Raises: BadRequest, ContextTooLong."""
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):  # a bool is not an id
        raise BadRequest("tokens: input should be a list of token ids", param="tokens")
    if len(tokens) > limit:
        raise ContextTooLong(
            f"`tokens` must have {limit} tokens at most. Given: {len(tokens)}", param="tokens"
        )
    check_ids(tokens, tokenizer.vocab_size, "tokens")
    return tokens
