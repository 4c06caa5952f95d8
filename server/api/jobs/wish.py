"""Jobs: the routes of TuneOS's fine-tuning wizard. A job made an adapter, and its id is the adapter's.

The stream is for `EventSource`, which can do little: a GET without headers of its own. And it reconnects
whenever a connection ends, however it ends, naming the event that it saw last. So every event has an id; a
stream whose connection drops waits for its client (see replay.py) and goes on where it was; and who has
seen the end is answered 204, which is what makes a browser stop. Otherwise each reconnect would be another
generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import Message

from server.api.access import usable_name
from server.api.frames import FrameSource
from server.api.generation import generation_endpoint, read_json, submit
from server.api.headers import resumed_headers, stream_headers
from server.api.http import Endpoint, Exchange
from server.api.jobs.render import JobWriter, whole_body
from server.api.jobs.schema import InferBody, InferQuery
from server.api.json_body import check_json_type
from server.api.outlet import Outlet
from server.api.ports import ModelCard, Service
from server.api.records import EVENT_STREAM, Accepted, Draft, FrameWriter, TextPrompt, WholeChoice
from server.api.replay import Miss, Reader
from server.api.schema import validate
from server.api.state import ApiOptions, ServerState
from server.api.streaming import first_events, send_frames, while_connected
from server.errors import ContextTooLong, ServeError
from server.types import SamplingParams

_MAX_NEW_TOKENS = 256
_TEMPERATURE = 0.7
_UNSTORED = (b"cache-control", b"no-store, no-transform")
_STREAM_TYPE = (b"content-type", b"text/event-stream; charset=utf-8")


@dataclass(frozen=True, slots=True)
class JobWish:
    """`POST /api/jobs/{id}/infer`, and `GET` and `POST .../infer/stream`"""

    job: str
    body: InferBody
    is_stream: bool

    def draft(self, card: ModelCard, options: ApiOptions) -> Draft:
        body = self.body
        return Draft(
            model=self.job,
            prompts=(TextPrompt(body.prompt),),
            sampling=SamplingParams(
                temperature=_TEMPERATURE if body.temperature is None else body.temperature, seed=body.seed
            ),
            max_tokens=body.max_new_tokens,
            usual_max_tokens=_MAX_NEW_TOKENS,
            is_cut_to_context=True,
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        return ContextTooLong(
            f"the prompt has {num_prompt} tokens, and the model's context of {limit} must hold an answer too",
            param="prompt",
        )

    def writer(self, accepted: Accepted) -> FrameWriter:
        return JobWriter()

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        return whole_body(choices[0])


def infer_endpoint(state: ServerState) -> Endpoint:
    """`POST /api/jobs/{id}/infer`"""

    def read(raw: dict[str, object], exchange: Exchange) -> JobWish:
        return JobWish(exchange.path_param("id"), validate(InferBody, raw), is_stream=False)

    return _unstored(generation_endpoint(state, read, check_json_type))


def stream_endpoint(state: ServerState) -> Endpoint:
    """`GET` and `POST /api/jobs/{id}/infer/stream`; HEAD begins nothing."""

    async def endpoint(exchange: Exchange) -> None:
        # While the server drains, what runs may be gone on with; `_begin` asks whether more may begin.
        service = state.service or state.require_service()
        wish = await _read(state, service, exchange)
        if exchange.scope["method"] == "HEAD":
            await exchange.answer_head(200, [_STREAM_TYPE])
            return
        state.num_active += 1
        try:
            await while_connected(exchange, _stream(state, service, exchange, wish))
        finally:
            state.num_active -= 1

    return _unstored(endpoint)


async def _read(state: ServerState, service: Service, exchange: Exchange) -> JobWish:
    """Raises: BadRequest, PayloadTooLarge."""
    if exchange.scope["method"] == "POST":
        check_json_type(exchange.header(b"content-type"))
        raw = await exchange.read_body(state.options.max_body_bytes)
        body = await read_json(service, raw, lambda value: validate(InferBody, value))
    else:
        body = validate(InferQuery, dict(exchange.query()))
    return JobWish(exchange.path_param("id"), body, is_stream=True)


async def _stream(state: ServerState, service: Service, exchange: Exchange, wish: JobWish) -> None:
    """Go on with what the client has begun to read, or begin. Raises: ServeError."""
    usable_name(wish.job, service, exchange.caller)  # its key may use less than when the stream began
    body = wish.body
    whose = state.recordings.fingerprint(
        exchange.caller.digest, wish.job, body.prompt, body.max_new_tokens, body.temperature, body.seed
    )
    seen = _last_event_id(exchange)
    found = Miss.FOREIGN if seen is None else state.recordings.go_on(seen, whose)
    if found is Miss.NOTHING_LEFT:
        await exchange.answer_head(204)
        return
    if isinstance(found, Reader):
        reader, headers = found, resumed_headers(found.headers, state.clock() - exchange.received)
    else:
        reader, headers = await _begin(state, exchange, wish, whose)
    options = state.options
    outlet = Outlet(exchange, keep_alive_s=options.keep_alive_s, send_timeout_s=options.send_timeout_s)
    try:
        await send_frames(exchange, reader.events(lambda: outlet.is_blocked), outlet, EVENT_STREAM, headers)
    finally:
        reader.leave()


async def _begin(
    state: ServerState, exchange: Exchange, wish: JobWish, whose: bytes
) -> tuple[Reader, dict[str, str]]:
    """A generation of its own, as far as its first token or the header deadline. Raises: ServeError."""
    accepted, stream = await submit(state, state.require_service(), exchange, wish)
    try:
        deadline = exchange.received + state.options.header_deadline_s
        first = await first_events(stream, deadline - state.clock())
        source = FrameSource(exchange.request_id, stream, first, 1, wish.writer(accepted))
        headers = stream_headers(accepted, state.clock() - exchange.received)
        return state.recordings.begin(whose, source, headers), headers
    except BaseException:
        stream.close()
        raise


def _last_event_id(exchange: Exchange) -> str | None:
    """The event that the client saw last: in the header, or in the query, where polyfills put it."""
    query = dict(exchange.query())
    seen = exchange.header(b"last-event-id") or query.get("lastEventId") or query.get("last_event_id")
    return seen or None


def _unstored(endpoint: Endpoint) -> Endpoint:
    """Whatever the endpoint answers, refusals too, is for this client and this time: nobody may keep it."""

    async def unstored(exchange: Exchange) -> None:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [header for header in message["headers"] if header[0] != _UNSTORED[0]]
                message["headers"] = [*others, _UNSTORED]
            await exchange.send(message)

        inner = Exchange(exchange.scope, exchange.receive, send)
        try:
            await endpoint(inner)
        except ServeError as error:
            await inner.refuse(error)

    return unstored
