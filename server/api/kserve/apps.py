"""KServe v2 for Inferless apps: their inputs from any form of body, and their outputs as they come.

What an app takes is in its schema. A shape of [1] reaches the app as one value, other shapes as lists. A
stream carries exactly what the app sends, and `model_name` and `model_version` beside it.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Literal

from server.api.generation import read_json
from server.api.headers import BASE_MODEL, header_value, raw_headers
from server.api.http import Endpoint, Exchange, log_bug
from server.api.json_body import INLINE_BYTES, check_tolerated_type
from server.api.kserve.render import envelope
from server.api.kserve.schema import InferBody
from server.api.kserve.tensors import Tensor, check_element, nested, output_tensor, read_tensors
from server.api.kserve.wish import named_values
from server.api.outlet import Outlet
from server.api.ports import Service
from server.api.records import EVENT_STREAM
from server.api.schema import validate
from server.api.shapes import json_text, long_json_text, shown, to_json
from server.api.state import ServerState
from server.api.streaming import send_frames, while_connected
from server.errors import BadRequest, EngineFailed, InternalError, ServeError
from server.inferless.run import AppRun
from server.inferless.schema import AppInput, AppSchema, Family
from server.inferless.worker import AppWorker

_MANY_ELEMENTS = 1000
_NUMBER_CHARS = 50

Action = Literal["infer", "generate", "generate_stream"]
Output = Mapping[str, object]


def app_endpoint(state: ServerState, action: Action) -> Endpoint:
    """One of the three routes, for a path whose `id` is an app."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        app = state.apps.get(exchange.path_param("id"))
        assert app is not None, "the route has looked"
        check_tolerated_type(exchange.header(b"content-type"))
        raw = await exchange.read_body(state.options.max_body_bytes)
        schema = app.require_schema()
        if action == "infer" and schema.is_streaming:
            raise BadRequest("this app streams: use generate_stream", param="model")
        state.num_active += 1
        try:
            write = json_text if len(raw) <= INLINE_BYTES else long_json_text

            def read(body: dict[str, object]) -> tuple[str | None, bytes]:
                request_id, inputs = read_inputs(body, action, schema)
                return request_id, write(inputs).encode("ascii")

            request_id, inputs = await read_json(service, raw, read)
            del raw
            await while_connected(
                exchange, _answer(state, service, exchange, app, action, request_id, inputs)
            )
        finally:
            state.num_active -= 1

    return endpoint


def read_inputs(
    body: dict[str, object], action: Action, schema: AppSchema
) -> tuple[str | None, dict[str, object]]:
    """The request's id and what the app gets. Raises: BadRequest that names the input."""
    if action == "infer" or isinstance(body.get("inputs"), list):
        infer = validate(InferBody, body)
        return infer.id, _from_tensors(read_tensors(infer.inputs), schema)
    request_id, values = named_values(body)
    return request_id, _from_values(values, schema)


def _from_tensors(tensors: Sequence[Tensor], schema: AppSchema) -> dict[str, object]:
    given = {tensor.name: tensor for tensor in tensors}
    if unknown := given.keys() - {each.name for each in schema.inputs}:
        raise BadRequest(f"the app has no input {shown(min(unknown))}", param="inputs")
    inputs: dict[str, object] = {}
    for each in _present(schema, given):
        tensor = given[each.name]
        _check_streamable(each, tensor.datatype, schema)
        for element in tensor.elements:
            check_element(element, each.datatype, each.name)
        inputs[each.name] = _shaped(each, tensor.shape, tensor.elements)
    return inputs


def _from_values(values: Mapping[str, object], schema: AppSchema) -> dict[str, object]:
    """A value or a flat list for each input; names that are no inputs are passed over, as Triton does."""
    inputs: dict[str, object] = {}
    for each in _present(schema, values):
        value = values[each.name]
        _check_streamable(each, each.datatype, schema)
        if each.family is Family.ANY:
            inputs[each.name] = value
            continue
        elements = value if isinstance(value, list) else [value]
        for element in elements:
            check_element(element, each.datatype, each.name)
        inputs[each.name] = _shaped(each, (len(elements),), elements)
    return inputs


def _present(schema: AppSchema, given: Mapping[str, object]) -> list[AppInput]:
    """The inputs that a request brings. Raises: BadRequest if one is missing."""
    for each in schema.inputs:
        if each.is_required and given.get(each.name) is None:
            raise BadRequest(f"the input {each.name} is missing", param=each.name)
    return [each for each in schema.inputs if given.get(each.name) is not None]


def _check_streamable(each: AppInput, datatype: str, schema: AppSchema) -> None:
    """Inferless streams take text, integers and booleans, one of each. Raises: BadRequest."""
    if schema.is_streaming and Family.FLOAT in (each.family, _family(datatype)):
        raise BadRequest(
            f"{each.name}: an app that streams takes STRING, INT and BOOLEAN, not {datatype}", param=each.name
        )


def _family(datatype: str) -> Family:
    return AppInput("", datatype, (1,), is_required=False).family


def _shaped(each: AppInput, shape: tuple[int, ...], elements: Sequence[object]) -> object:
    """Raises: BadRequest for a shape that the app does not take."""
    if each.is_single and len(elements) == 1:
        return elements[0]
    if len(shape) == len(each.shape) + 1 and shape[0] == 1:
        shape = shape[1:]  # a batch of one: `inferless.call(..., is_batch=True)`
    is_fitting = len(shape) == len(each.shape) and all(
        wanted in (-1, size) for wanted, size in zip(each.shape, shape, strict=True)
    )
    if not is_fitting:
        raise BadRequest(
            f"{each.name}: the shape is {list(shape)} where the app takes {list(each.shape)}", param=each.name
        )
    return nested(elements, shape)


# --- Answers ------------------------------------------------------------------------------------------------


async def _answer(
    state: ServerState,
    service: Service,
    exchange: Exchange,
    app: AppWorker,
    action: Action,
    request_id: str | None,
    inputs: bytes,
) -> None:
    run = app.submit(exchange.request_id, inputs)
    said = envelope(app.name, request_id)
    try:
        if action == "generate_stream":
            await _answer_stream(state, service, exchange, app, run, said)
        else:
            outputs = [output async for output in run]
            write = _infer_body if action == "infer" else _generate_body
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(service.pool, write, said, outputs)
            await exchange.answer(body, headers=raw_headers(_headers(state, exchange, app)))
    finally:
        run.close()


async def _answer_stream(
    state: ServerState,
    service: Service,
    exchange: Exchange,
    app: AppWorker,
    run: AppRun,
    said: dict[str, object],
) -> None:
    first = await _first_output(run, exchange.received + state.options.header_deadline_s - state.clock())
    outlet = Outlet(
        exchange, keep_alive_s=state.options.keep_alive_s, send_timeout_s=state.options.send_timeout_s
    )
    frames = _frames(service, run, first, said)
    await send_frames(exchange, frames, outlet, EVENT_STREAM, _headers(state, exchange, app))


async def _first_output(run: AppRun, wait_s: float) -> list[Output]:
    """The first output, or nothing if there is none in time or at all.

    Raises: ServeError if the run has failed: the status is still ours to choose.
    """
    try:
        async with asyncio.timeout(max(wait_s, 0)):
            return [await anext(run)]
    except (TimeoutError, StopAsyncIteration):
        return []


async def _frames(
    service: Service, run: AppRun, first: Sequence[Output], said: Mapping[str, object]
) -> AsyncGenerator[bytes, None]:
    try:
        for output in first:
            yield await _frame(service, output, said)
        async for output in run:
            yield await _frame(service, output, said)
    except ServeError as error:
        yield _error_frame(error)
    except Exception as error:  # outermost frame of the answer: the client gets an end, whatever went wrong
        log_bug(error, run.request_id)
        yield _error_frame(InternalError("internal error"))
    finally:
        run.close()


async def _frame(service: Service, output: Output, said: Mapping[str, object]) -> bytes:
    """Written in the pool if it is large."""

    def write() -> bytes:
        return f"data: {long_json_text(_flat_object(output, said))}\n\n".encode("ascii")

    if sum(map(_weight, output.values())) <= INLINE_BYTES:
        return write()
    return await asyncio.get_running_loop().run_in_executor(service.pool, write)


def _weight(value: object) -> int:
    """About as many characters of text as a value of a stream takes as long to write as."""
    if isinstance(value, list):  # a flat one
        is_long = len(value) > _MANY_ELEMENTS
        return INLINE_BYTES + 1 if is_long else sum(map(_weight, value))
    return len(value) if isinstance(value, str) else _NUMBER_CHARS


def _error_frame(error: ServeError) -> bytes:
    return b"data: " + to_json({"error": error.message}) + b"\n\n"


def _generate_body(said: Mapping[str, object], outputs: Sequence[Output]) -> bytes:
    """Raises: BadRequest for an app that has not answered exactly once."""
    if len(outputs) != 1:
        raise BadRequest("the app has not sent exactly one output: use generate_stream", param="model")
    return long_json_text(_flat_object(outputs[0], said)).encode("ascii")


def _flat_object(output: Output, said: Mapping[str, object]) -> dict[str, object]:
    """Sorted, as Triton writes it; ours win where an app has an output of the same name."""
    values = {name: _unwrapped(value) for name, value in output.items()}
    return dict(sorted({**values, **said}.items()))


def _infer_body(said: Mapping[str, object], outputs: Sequence[Output]) -> bytes:
    """Raises: EngineFailed for an output that no tensor can hold."""
    (output,) = outputs
    try:
        tensors = [output_tensor(name, value) for name, value in output.items()]
    except ValueError as error:
        raise EngineFailed(str(error)) from None
    return long_json_text({**said, "outputs": tensors}).encode("ascii")


def _unwrapped(value: object) -> object:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _headers(state: ServerState, exchange: Exchange, app: AppWorker) -> dict[str, str]:
    """What of the headers of a generation can be said of an app."""
    return {
        "x-model-id": header_value(app.name),
        "x-adapter-id": BASE_MODEL,
        "x-compute-time": str(round((state.clock() - exchange.received) * 1000)),
    }
