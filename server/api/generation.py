"""The one path that every generation takes, whatever protocol asked for it.

    body -> wish -> size checked -> adapter held -> prompt tokenised -> lengths checked -> submitted
         -> head held -> answered

Each step can refuse, and all of them come before the first byte of the answer. The header deadline counts
from receipt and covers waiting for an adapter too: one that is not ready by then is 503 while its load goes
on for the next caller.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from adapters.types import AdapterUse
from server.api.access import usable_name
from server.api.headers import raw_headers, stream_headers, whole_headers
from server.api.http import Endpoint, Exchange
from server.api.json_body import INLINE_BYTES, TypeCheck, parse_object
from server.api.ports import Lease, Service, TokenStream
from server.api.prompting import check_draft, stop_criteria, tokenise_prompts
from server.api.records import Accepted, Draft, WholeChoice, Wish
from server.api.state import ServerState
from server.api.streaming import collect, first_events, send_stream, while_connected
from server.errors import Unavailable
from server.types import GenerationRequest

# A token or an alternative with its log-probability takes about 3 microseconds to write.
_INLINE_LOGPROBS = 500
_NUMBERS_PER_TOKEN = 4  # numbers of a vector that take as long as a token
_IDS_PER_TOKEN = 32  # ids of a prompt, which some protocols hand back, that do
_ADAPTER_RETRY_S = 5

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
    draft = wish.draft(service.card, service.tokenizer, state.options)
    check_draft(service, draft, state.options, wish)
    with state.preparing():
        return await _prepare(state, service, exchange, wish, draft)


async def _prepare(
    state: ServerState, service: Service, exchange: Exchange, wish: Wish, draft: Draft
) -> tuple[Accepted, TokenStream]:
    lease = await hold_adapter(state, service, exchange, draft.model)
    try:
        prompts = await tokenise_prompts(service, draft.prompts)
        limit = service.card.max_model_len
        request = GenerationRequest(
            request_id=exchange.request_id,
            prompts=tuple(prompt.ids for prompt in prompts),
            sampling=draft.sampling,
            stop=stop_criteria(draft, prompts, limit, state.options, wish),
            adapter=None if lease is None else AdapterUse.of(lease.ref),
            n=draft.n,
            received=exchange.received,
            pooling=draft.pooling,
        )
        accepted = Accepted(
            request=request,
            prompts=prompts,
            card=service.card,
            tokenizer=service.tokenizer,
            model=service.card.id if lease is None else lease.ref.name,
            adapter_source=None if lease is None else _source(service, lease),
            created=state.unix_time(),
        )
        return accepted, service.submit(request, lease)
    except BaseException:
        if lease is not None:
            lease.release()
        raise


async def hold_adapter(
    state: ServerState, service: Service, exchange: Exchange, name: str | None
) -> Lease | None:
    """The right to use what a client calls `name`, None for the base model; waits until the header deadline.

    Raises: ServeError; for what the caller may not use, that it is unknown.
    """
    deadline = exchange.received + state.options.header_deadline_s
    usable = usable_name(name, service, exchange.caller)
    try:
        async with asyncio.timeout(max(deadline - state.clock(), 0)):
            return await service.resolve(usable)
    except TimeoutError:
        raise Unavailable(
            f"adapter {name!r} is still being loaded", param="model", retry_after_s=_ADAPTER_RETRY_S
        ) from None


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


def _source(service: Service, lease: Lease) -> str:
    known = service.registry.get(lease.ref.name)
    return "local" if known is None else known.source  # unloaded since: still served by this lease
