"""The one path that every generation takes, whatever protocol asked for it.

    body -> wish -> size checked -> adapter held -> prompt tokenised -> lengths checked -> submitted
         -> head held -> answered

Each step can refuse, and all of them come before the first byte of the answer. The header deadline counts
from receipt and covers waiting for an adapter too: one that is not ready by then is 503 while its load goes
on for the next caller.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from server.api.access import usable_wish
from server.api.headers import raw_headers, stream_headers, whole_headers
from server.api.http import Endpoint, Exchange
from server.api.json_body import INLINE_BYTES, TypeCheck, parse_object
from server.api.ports import Lease, Service, Tokenizer, TokenStream
from server.api.prompting import check_draft, stop_criteria, tokenise_prompts
from server.api.records import Accepted, Draft, WholeChoice, Wish
from server.api.shares import share_of
from server.api.state import ServerState
from server.api.streaming import collect, first_events, send_stream, while_connected
from server.errors import Unavailable
from server.types import GenerationRequest
from server.wishes import NO_WISH, AdapterWish, Secret

# A token or an alternative with its log-probability takes about 3 microseconds to write.
_INLINE_LOGPROBS = 500
_NUMBERS_PER_TOKEN = 4  # numbers of a vector that take as long as a token
_IDS_PER_TOKEN = 32  # ids of a prompt, which some protocols hand back, that do
_ADAPTER_RETRY_S = 5
_HUB_TOKEN = "hf_"  # noqa: S105 - what one begins with

T = TypeVar("T")

ReadWish = Callable[[dict[str, object], Exchange], Wish]


def generation_endpoint(state: ServerState, read_wish: ReadWish, check_type: TypeCheck) -> Endpoint:
    """A route that generates; `read_wish` is all that its protocol has to say about requests."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        check_type(exchange.header(b"content-type"))
        raw = await exchange.read_body(state.options.max_body_bytes)
        state.num_active += 1
        try:
            wish = await read_json(service, raw, lambda body: read_wish(body, exchange))
            del raw  # not kept while the answer runs
            await while_connected(exchange, generate(state, service, exchange, wish))
        finally:
            state.num_active -= 1

    return endpoint


async def read_json(service: Service, raw: bytes, read: Callable[[dict[str, object]], T]) -> T:
    """Parse and validate a body; in the pool if it is large. Raises: BadRequest."""
    if len(raw) <= INLINE_BYTES:
        return read(parse_object(raw))
    return await asyncio.get_running_loop().run_in_executor(service.pool, lambda: read(parse_object(raw)))


async def generate(state: ServerState, service: Service, exchange: Exchange, wish: Wish) -> None:
    """Everything from a wish to the last byte of its answer. Raises: ServeError before the first one."""
    accepted, stream = await submit(state, service, exchange, wish)
    try:
        if wish.is_stream:
            await _answer_stream(state, exchange, wish, accepted, stream)
        else:
            choices = await collect(stream, accepted.request.num_choices)
            headers = whole_headers(accepted, choices)
            body = await _whole(service, wish, accepted, choices)
            await exchange.answer(body, headers=raw_headers(headers))
    finally:
        stream.close()


async def submit(
    state: ServerState, service: Service, exchange: Exchange, wish: Wish
) -> tuple[Accepted, TokenStream]:
    """All checks, then the queue. On any refusal nothing is held."""
    draft = wish.draft(service.card, state.options)
    check_draft(service, draft, state.options, wish)
    with state.preparing():
        asked_for = draft.adapter.names_for(draft.model)
        await state.intake.turn(
            share_of(exchange.caller, asked_for, service.card, state.options.shares).tenant
        )
        return await _prepare(state, service, exchange, wish, draft)


async def _prepare(
    state: ServerState, service: Service, exchange: Exchange, wish: Wish, draft: Draft
) -> tuple[Accepted, TokenStream]:
    lease = await hold_adapter(state, service, exchange, draft.model, draft.adapter)
    try:
        tokenizer = service.tokenizer_for(lease)
        prompts = await tokenise_prompts(service, tokenizer, draft.prompts)
        limit = service.card.max_model_len
        share = share_of(
            exchange.caller, () if lease is None else lease.names, service.card, state.options.shares
        )
        request = GenerationRequest(
            request_id=exchange.request_id,
            prompts=tuple(prompt.ids for prompt in prompts),
            sampling=draft.sampling,
            stop=stop_criteria(draft, prompts, limit, state.options, wish),
            adapter=None if lease is None else lease.use,
            n=draft.n,
            received=exchange.received,
            pooling=draft.pooling,
            tenant=share.tenant,
            weight=share.weight,
            quotas=share.quotas,
            invocation_tokens=() if lease is None else lease.invocation_tokens,
        )
        accepted = Accepted(
            request=request,
            prompts=prompts,
            card=service.card,
            tokenizer=tokenizer,
            model=service.card.id if lease is None else lease.use.name,
            adapter_source=None if lease is None else lease.source,
            created=state.unix_time(),
        )
        return accepted, service.submit(request, lease)
    except BaseException:
        if lease is not None:
            lease.release()
        raise


async def hold_adapter(
    state: ServerState, service: Service, exchange: Exchange, name: str | None, wish: AdapterWish = NO_WISH
) -> Lease | None:
    """The right to use what a client calls `name`, or what the wish wants instead, None for the base model;
    waits until the header deadline. The wish's token is forgotten.

    Raises: ServeError; for what the caller may not use, that it is unknown.
    """
    deadline = exchange.received + state.options.header_deadline_s
    wish = _with_bearer(wish, exchange, state)
    try:
        usable, allowed = usable_wish(name, wish, service, exchange.caller)
        async with asyncio.timeout(max(deadline - state.clock(), 0)):
            return await service.resolve(usable, allowed)
    except TimeoutError:
        raise Unavailable(
            f"{_called(name, wish)} still being loaded", param="model", retry_after_s=_ADAPTER_RETRY_S
        ) from None
    finally:
        wish.forget_token()


def _with_bearer(wish: AdapterWish, exchange: Exchange, state: ServerState) -> AdapterWish:
    """As LoRAX has it, a bearer stands for the token that a request does not bring. But what a client brings
    as a key must go nowhere: so only to the Hub, only what is a token of the Hub's, and only where there are
    no keys.
    """
    if wish.source != "hub" or wish.token is not None or state.options.asks_for_key:
        return wish
    scheme, _, bearer = (exchange.header(b"authorization") or "").partition(" ")
    is_token = scheme.lower() == "bearer" and bearer.startswith(_HUB_TOKEN)
    return replace(wish, token=Secret(bearer.strip())) if is_token else wish


def _called(name: str | None, wish: AdapterWish) -> str:
    """What is waited for."""
    names = ", ".join(map(repr, wish.names_for(name)))
    return f"adapter {names} is" if wish.parts is None and wish.merge is None else f"adapters {names} are"


@asynccontextmanager
async def held_tokenizer(
    state: ServerState,
    service: Service,
    exchange: Exchange,
    name: str | None,
    wish: AdapterWish = NO_WISH,
) -> AsyncIterator[Tokenizer]:
    """What reads and writes for what is meant; adapters are held meanwhile. Raises: ServeError."""
    with state.preparing():
        lease = await hold_adapter(state, service, exchange, name, wish)
        try:
            yield service.tokenizer_for(lease)
        finally:
            if lease is not None:
                lease.release()


async def _answer_stream(
    state: ServerState, exchange: Exchange, wish: Wish, accepted: Accepted, stream: TokenStream
) -> None:
    deadline = exchange.received + state.options.header_deadline_s
    first = await first_events(stream, deadline - state.clock())
    await send_stream(
        exchange,
        stream,
        first,
        accepted.request.num_choices,
        wish.writer(accepted),
        stream_headers(accepted, state.clock() - exchange.received),
        keep_alive_s=state.options.keep_alive_s,
        send_timeout_s=state.options.send_timeout_s,
    )


async def _whole(service: Service, wish: Wish, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
    """The body of an answer; written in the pool if it may be large."""
    size = sum(_size(accepted, choice) for choice in choices)
    if size + accepted.request.num_prompt_tokens // _IDS_PER_TOKEN <= _INLINE_LOGPROBS:
        return wish.whole(accepted, choices)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(service.pool, wish.whole, accepted, choices)


def _size(accepted: Accepted, choice: WholeChoice) -> int:
    """What a choice takes to write, in tokens."""
    sampling = accepted.request.sampling
    num_written = len(choice.tokens) * (1 + (sampling.num_logprobs or 0))
    num_written += len(choice.prompt) * (1 + (sampling.num_prompt_logprobs or 0))
    return num_written + len(choice.vector or ()) // _NUMBERS_PER_TOKEN
