"""Inferless apps over HTTP, in their own processes and on a real port. Rows K2 to K20 where bytes matter."""

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.app import build_app
from server.api.kserve import apps as kserve_apps
from server.api.shapes import long_json_text
from server.api.state import Phase, ServerState
from server.inferless.apps import Apps, AppsOptions
from server.inferless.wire import WINDOW
from server.inferless.worker import AppState
from tests.server.api.conftest import connect, serve
from tests.server.api.fake_service import FakeService
from tests.server.api.raw_http import Connection, ask, post, until
from tests.server.inferless.making import TEXT, make_app, quick

MakeState = Callable[..., ServerState]

SCHEMA = """
    INPUT_SCHEMA = {
        "TEXT": {"datatype": "STRING", "required": True, "shape": [1], "example": ["hi"]},
        "N": {"datatype": "INT16", "required": False, "shape": [1]},
        "FLAG": {"datatype": "BOOLEAN", "required": False, "shape": [1]},
        "SPEED": {"datatype": "FP32", "required": False, "shape": [1]},
    }
    IS_STREAMING_OUTPUT = True
"""

# Does what TEXT says; anything else comes back.
STREAMING = """
    import json, os
    from pathlib import Path

    class InferlessPythonModel:
        def initialize(self):
            self.turn = 0

        def infer(self, inputs, stream_output_handler):
            send = stream_output_handler.send_streamed_output
            self.turn += 1
            for word in inputs["TEXT"].split():
                if word == "raise":
                    raise ValueError("as told")
                if word == "crash":
                    os._exit(9)
                if word == "nested":
                    send({"OUT": {"a": 1}})
                elif word == "other":
                    send({"OTHER": "x"})
                elif word == "turn":
                    send({"OUT": self.turn})
                elif word == "list":
                    send({"OUT": ["a", "b"]})
                elif word == "inputs":
                    send({"OUT": json.dumps(inputs, sort_keys=True)})
                elif word == "long":
                    send({"OUT": list(range(2000))})
                elif word == "endless":
                    while True:
                        send({"OUT": "x" * 65536})
                elif word.startswith("gate="):
                    Path(word[5:]).read_text()
                else:
                    send({"OUT": word})
            stream_output_handler.finalise_streamed_output()

        def finalize(self, args):
            pass
"""

WHOLE_SCHEMA = """
    INPUT_SCHEMA = {
        "TEXT": {"datatype": "STRING", "required": True, "shape": [1]},
        "N": {"datatype": "INT8", "required": False, "shape": [1]},
        "X": {"datatype": "FP32", "required": False, "shape": [1]},
        "WORDS": {"datatype": "STRING", "required": False, "shape": [-1]},
        "GRID": {"datatype": "INT32", "required": False, "shape": [2, -1]},
    }
"""

WHOLE = """
    import json

    class InferlessPythonModel:
        def initialize(self):
            pass

        def infer(self, inputs):
            if inputs["TEXT"] == "ragged":
                return {"OUT": [[1], [1, 2]]}
            if inputs["TEXT"] == "mixed":
                return {"OUT": [1, "a"]}
            if inputs["TEXT"] == "raise":
                raise ValueError("as told")
            if inputs["TEXT"] == "nothing":
                return None
            seen = json.dumps(inputs, sort_keys=True)
            return {"OUT": seen, "N": 5, "X": [0.5, 1], "GRID": [[1, 2], [3, 4]], "YES": True}
"""

STREAM = "/v2/models/toy/generate_stream"
INFER = "/v2/models/whole/infer"


def tensor(name: str, datatype: str, *data: object, shape: list[int] | None = None) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": list(data)}


@pytest.fixture
async def apps(tmp_path: Path, state: ServerState) -> AsyncIterator[Apps]:
    folders = [make_app(tmp_path, STREAMING, SCHEMA), make_app(tmp_path, WHOLE, WHOLE_SCHEMA, name="whole")]
    state.apps = Apps(folders, AppsOptions(limits=quick(max_queued=3)))
    state.apps.start()
    await until(lambda: state.apps.are_ready)
    yield state.apps
    await state.apps.close()


@pytest.fixture
async def app_client(apps: Apps, state: ServerState) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(build_app(state)) as http:
        yield http


@pytest.fixture
async def app_port(apps: Apps, state: ServerState) -> AsyncIterator[int]:
    async with serve(build_app(state)) as number:
        yield number


def frame(text: object) -> bytes:
    return (
        b"data: "
        + json.dumps({"OUT": text, "model_name": "toy", "model_version": "1"}, separators=(",", ":")).encode()
        + b"\n\n"
    )


def gate(tmp_path: Path, name: str = "gate") -> Path:
    """A pipe: who reads it waits for the one who opens it for writing."""
    path = tmp_path / name
    os.mkfifo(path)
    return path


async def open_gate(path: Path) -> None:
    await asyncio.to_thread(path.write_text, "")


# --- Streams ------------------------------------------------------------------------------------------------


FORMS = [
    (STREAM, {"parameters": {"TEXT": "How to"}}),
    ("/v2/models/toy/versions/1/generate_stream", {"parameters": {"TEXT": "How to"}}),
    (STREAM, {"TEXT": "How to"}),
    (STREAM, {"TEXT": ["How to"], "unknown": 1}),
    (STREAM, {"inputs": [tensor("TEXT", "BYTES", "How to")]}),
    (STREAM, {"inputs": [tensor("TEXT", "STRING", "How to", shape=[1, 1])]}),
]


async def test_K2_K3_K4_frames_of_a_stream_whatever_form_the_body_has(app_port: int) -> None:
    for path, body in FORMS:
        answer = await ask(app_port, post(path, body))

        assert answer.status == 200, body
        assert answer.header("content-type") == "text/event-stream; charset=utf-8"
        assert answer.header("x-model-id") == "toy"
        assert answer.header("x-accel-buffering") == "no"
        assert answer.chunks == [frame("How"), frame("to")], body


async def test_stream_without_an_output_is_empty_and_ends(app_port: int) -> None:
    answer = await ask(app_port, post(STREAM, {"TEXT": ""}))

    assert (answer.status, answer.chunks) == (200, [])


async def test_id_of_a_request_is_in_every_frame(app_port: int) -> None:
    answer = await ask(app_port, post(STREAM, {"id": "mine", "TEXT": "a"}))

    assert answer.body == b'data: {"OUT":"a","id":"mine","model_name":"toy","model_version":"1"}\n\n'


async def test_frames_are_ascii(app_port: int) -> None:
    answer = await ask(app_port, post(STREAM, {"TEXT": "é\u2028ü"}))

    assert answer.body.isascii()
    assert answer.body.count(b"\n") == 4  # \u2028 is a space to str.split


async def test_K6_K8_values_reach_the_app_as_python_scalars(app_client: httpx.AsyncClient) -> None:
    text = 'inputs {"a":[1,2]}'
    bodies: list[dict[str, object]] = [
        {"parameters": {"TEXT": text, "N": -3, "FLAG": True}},
        {"inputs": [tensor("TEXT", "BYTES", text), tensor("N", "INT64", -3), tensor("FLAG", "BOOL", True)]},
    ]
    for body in bodies:
        first = (await app_client.post(STREAM, json=body)).text.split("\n\n")[0]
        seen = json.loads(json.loads(first.removeprefix("data: "))["OUT"])

        assert seen == {"TEXT": text, "N": -3, "FLAG": True}


NOT_ALLOWED: list[tuple[dict[str, Any], str]] = [
    ({}, "TEXT"),
    ({"parameters": {"TEXT": None}}, "TEXT"),
    ({"TEXT": 5}, "TEXT"),
    ({"TEXT": {"a": 1}}, "TEXT"),
    ({"TEXT": ["a", "b"]}, "TEXT"),
    ({"TEXT": "a", "parameters": {"TEXT": "b"}}, "twice"),
    ({"TEXT": "a", "N": 0.5}, "N"),
    ({"TEXT": "a", "N": 40_000}, "INT16"),
    ({"TEXT": "a", "N": True}, "N"),
    ({"TEXT": "a", "FLAG": 1}, "FLAG"),
    ({"TEXT": "a", "SPEED": 0.5}, "SPEED"),
    ({"inputs": [tensor("TEXT", "BYTES", "a"), tensor("N", "FP32", 1)]}, "N"),
    ({"inputs": [tensor("TEXT", "BYTES", "a", "b")]}, "TEXT"),
    ({"inputs": [tensor("TEXT", "INT8", 5)]}, "TEXT"),
    ({"inputs": [tensor("TEXT", "BYTES", "a"), tensor("WHAT", "BYTES", "a")]}, "WHAT"),
    ({"inputs": []}, "TEXT"),
]


async def test_K6_K7_what_the_schema_does_not_allow_is_a_400_before_any_frame(
    app_client: httpx.AsyncClient,
) -> None:
    for body, says in NOT_ALLOWED:
        response = await app_client.post(STREAM, json=body)

        assert response.status_code == 400, body
        assert set(response.json()) == {"error"}
        assert says in response.json()["error"], body


@pytest.mark.parametrize("text", ["a nested b", "a other b"])
async def test_K9_K10_output_of_another_form_is_an_error_frame_and_the_end(app_port: int, text: str) -> None:
    answer = await ask(app_port, post(STREAM, {"TEXT": text}))
    again = await ask(app_port, post(STREAM, {"TEXT": "c"}))

    assert answer.chunks[0] == frame("a")
    assert set(json.loads(answer.chunks[1].removeprefix(b"data: "))) == {"error"}
    assert len(answer.chunks) == 2
    assert again.chunks == [frame("c")]


async def test_K10_lists_stay_lists(app_port: int) -> None:
    assert (await ask(app_port, post(STREAM, {"TEXT": "list"}))).chunks == [frame(["a", "b"])]


@pytest.mark.parametrize("word", ["raise", "crash"])
async def test_K13_failure_in_a_stream_is_an_error_frame_and_the_next_request_works(
    app_port: int, word: str
) -> None:
    answer = await ask(app_port, post(STREAM, {"TEXT": f"a {word} b"}))
    again = await ask(app_port, post(STREAM, {"TEXT": "c"}))

    assert answer.status == 200
    assert answer.chunks[0] == frame("a")
    assert set(json.loads(answer.chunks[1].removeprefix(b"data: "))) == {"error"}
    assert len(answer.chunks) == 2
    assert again.chunks == [frame("c")]


@pytest.mark.parametrize("text", ["raise", "crash", "nested"])
async def test_T24_failure_before_the_first_frame_is_a_true_error(app_port: int, text: str) -> None:
    answer = await ask(app_port, post(STREAM, {"TEXT": text}))

    assert answer.status == 500
    assert set(json.loads(answer.body)) == {"error"}


async def test_K14_client_that_leaves_is_not_felt_by_the_next_one(app_port: int, tmp_path: Path) -> None:
    wait = gate(tmp_path)
    leaving = await Connection.open(app_port)
    await leaving.send(post(STREAM, {"TEXT": f"a gate={wait} old old old"}))
    await leaving.read_head()
    assert await leaving.read_chunk() == frame("a")
    leaving.drop()
    following = asyncio.create_task(ask(app_port, post(STREAM, {"TEXT": "mine"})))
    await open_gate(wait)

    assert (await following).chunks == [frame("mine")]


async def test_K15_three_requests_at_once_are_served_one_after_the_other(
    app_port: int, tmp_path: Path, apps: Apps
) -> None:
    wait = gate(tmp_path)
    worker = apps.get("toy")
    assert worker is not None
    tasks = [asyncio.create_task(ask(app_port, post(STREAM, {"TEXT": f"gate={wait} turn"})))]
    await until(lambda: bool(worker._running))
    for count in (1, 2):
        tasks.append(asyncio.create_task(ask(app_port, post(STREAM, {"TEXT": "turn"}))))
        await until(lambda count=count: len(worker._queue) == count)  # type: ignore[misc]
    await open_gate(wait)

    assert [(await task).chunks for task in tasks] == [[frame(1)], [frame(2)], [frame(3)]]


async def test_K16_client_that_does_not_read_blocks_its_app_and_no_other(app_port: int, apps: Apps) -> None:
    """What the sockets between hold is some megabytes; then nothing more comes of the app."""
    worker = apps.get("toy")
    assert worker is not None
    with socket.create_connection(("127.0.0.1", app_port)) as stalled:
        stalled.sendall(post(STREAM, {"TEXT": "endless"}))
        await until(lambda: bool(worker._running))
        (run,) = worker._running.values()
        while True:
            before = run.num_outputs
            for _ in range(20):  # each takes longer than an output of the other app
                other = await ask(app_port, post(INFER, {"inputs": [tensor("TEXT", "BYTES", "x")]}))
                assert other.status == 200
            if before == run.num_outputs > WINDOW:
                break
        health = await ask(app_port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")

        assert health.status == 200
        assert run.num_outputs * 65536 < 64 * 2**20


async def test_queue_beyond_its_bound_is_429(app_port: int, tmp_path: Path, apps: Apps) -> None:
    wait = gate(tmp_path)
    worker = apps.get("toy")
    assert worker is not None
    first = asyncio.create_task(ask(app_port, post(STREAM, {"TEXT": f"gate={wait}"})))
    await until(lambda: bool(worker._running))
    queued = [asyncio.create_task(ask(app_port, post(STREAM, {"TEXT": "x"}))) for _ in range(3)]
    await until(lambda: len(worker._queue) == 3)
    refused = await ask(app_port, post(STREAM, {"TEXT": "x"}))
    await open_gate(wait)

    assert refused.status == 429
    assert refused.header("retry-after")
    assert [answer.status for answer in await asyncio.gather(first, *queued)] == [200] * 4


async def test_head_is_held_for_the_first_output_and_no_longer_than_the_deadline(
    make_state: MakeState, tmp_path: Path
) -> None:
    wait = gate(tmp_path)
    state = make_state(header_deadline_s=0.001, keep_alive_s=0.01)
    state.apps = Apps([make_app(tmp_path, STREAMING, SCHEMA)], AppsOptions(limits=quick()))
    state.apps.start()
    await until(lambda: state.apps.are_ready)
    async with serve(build_app(state)) as port:
        connection = await Connection.open(port)
        await connection.send(post(STREAM, {"TEXT": f"gate={wait} raise"}))

        assert (await connection.read_head()).status == 200
        assert await connection.read_chunk() == b": keep-alive\n\n"
        await open_gate(wait)
        chunk = await connection.read_chunk()
        while chunk == b": keep-alive\n\n":
            chunk = await connection.read_chunk()
        assert json.loads(chunk.removeprefix(b"data: ")) == {"error": "ValueError: as told"}
        connection.drop()
    await state.apps.close()


# --- Whole answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [INFER, "/v2/models/whole/versions/1/infer"])
async def test_K5_infer_answers_tensors(app_port: int, path: str) -> None:
    body = {"id": "7", "inputs": [tensor("TEXT", "BYTES", "hi")]}
    answer = await ask(app_port, post(path, body))

    assert answer.status == 200
    assert answer.body == (
        b'{"id":"7","model_name":"whole","model_version":"1","outputs":['
        b'{"name":"OUT","datatype":"BYTES","shape":[1],"data":["{\\"TEXT\\": \\"hi\\"}"]},'
        b'{"name":"N","datatype":"INT64","shape":[1],"data":[5]},'
        b'{"name":"X","datatype":"FP64","shape":[2],"data":[0.5,1]},'
        b'{"name":"GRID","datatype":"INT64","shape":[2,2],"data":[1,2,3,4]},'
        b'{"name":"YES","datatype":"BOOL","shape":[1],"data":[true]}]}'
    )


async def test_inputs_have_the_shapes_of_the_schema(app_client: httpx.AsyncClient) -> None:
    """What `inferless.call` makes of Python values: 64-bit numbers, whatever the schema says."""
    inputs = [
        tensor("TEXT", "BYTES", "hi"),
        tensor("N", "INT64", 5),
        tensor("X", "FP64", 0.5),
        tensor("WORDS", "BYTES", "a", "b"),
        {**tensor("GRID", "INT64"), "shape": [2, 2], "data": [[1, 2], [3, 4]]},
    ]
    seen = {"TEXT": "hi", "N": 5, "X": 0.5, "WORDS": ["a", "b"], "GRID": [[1, 2], [3, 4]]}
    batched = [{**each, "shape": [1, *each["shape"]]} for each in inputs]  # type: ignore[misc]
    for form in (inputs, batched):
        outputs = (await app_client.post(INFER, json={"inputs": form})).json()["outputs"]
        assert json.loads(outputs[0]["data"][0]) == seen


WRONG: list[tuple[list[dict[str, object]], str]] = [
    ([tensor("N", "INT8", 5)], "TEXT"),
    ([tensor("TEXT", "BYTES", "a"), tensor("N", "INT64", 300)], "INT8"),
    ([tensor("TEXT", "BYTES", "a"), tensor("N", "FP32", 1.5)], "N"),
    ([tensor("TEXT", "BYTES", "a"), tensor("N", "INT8", 1, 2)], "N"),
    ([tensor("TEXT", "BYTES", "a"), tensor("GRID", "INT8", 1, 2, 3, shape=[3, 1])], "GRID"),
    ([tensor("TEXT", "BYTES", "a"), tensor("X", "BYTES", "1.5")], "X"),
    ([tensor("TEXT", "BYTES", "a"), tensor("GRID", "INT8", shape=[2, 2**31 - 1, 0])], "elements"),
]


async def test_wrong_inputs_are_a_400_that_names_them(app_client: httpx.AsyncClient) -> None:
    for inputs, says in WRONG:
        response = await app_client.post(INFER, json={"inputs": inputs})

        assert response.status_code == 400, inputs
        assert says in response.json()["error"], inputs


@pytest.mark.parametrize("text", ["ragged", "mixed", "raise", "nothing"])
async def test_answers_that_are_no_tensors_are_500(app_client: httpx.AsyncClient, text: str) -> None:
    response = await app_client.post(INFER, json={"inputs": [tensor("TEXT", "BYTES", text)]})

    assert response.status_code == 500
    assert set(response.json()) == {"error"}


async def test_generate_answers_one_flat_object(app_client: httpx.AsyncClient) -> None:
    """Of an app that streams, too, if it has sent exactly one output."""
    whole = await app_client.post("/v2/models/whole/generate", json={"TEXT": "hi"})
    one = await app_client.post("/v2/models/toy/generate", json={"TEXT": "a"})
    two = await app_client.post("/v2/models/toy/generate", json={"TEXT": "a b"})
    streamed = await app_client.post("/v2/models/whole/generate_stream", json={"TEXT": "hi"})

    assert whole.json()["N"] == 5
    assert one.json() == {"OUT": "a", "model_name": "toy", "model_version": "1"}
    assert two.status_code == 400
    assert streamed.text.startswith("data: {")


@pytest.mark.parametrize("path", [STREAM, INFER])
async def test_long_answers_are_written_beside_the_event_loop(
    app_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    threads: list[threading.Thread] = []

    def noting(value: object) -> str:
        threads.append(threading.current_thread())
        return long_json_text(value)

    monkeypatch.setattr(kserve_apps, "long_json_text", noting)
    response = await app_client.post(path, json={"inputs": [tensor("TEXT", "BYTES", "long")]})

    assert response.status_code == 200
    assert threads, "the answer was written"
    assert threading.main_thread() not in threads


async def test_infer_of_an_app_that_streams_is_refused(app_client: httpx.AsyncClient) -> None:
    response = await app_client.post("/v2/models/toy/infer", json={"inputs": [tensor("TEXT", "BYTES", "a")]})

    assert response.status_code == 400
    assert "generate_stream" in response.json()["error"]


# --- Keys, life ---------------------------------------------------------------------------------------------


async def test_K19_key_is_asked_for_where_the_server_has_one(make_state: MakeState, tmp_path: Path) -> None:
    state = make_state(api_key="workspace key")
    state.apps = Apps([make_app(tmp_path, STREAMING, SCHEMA)], AppsOptions(limits=quick()))
    state.apps.start()
    await until(lambda: state.apps.are_ready)
    async with connect(build_app(state)) as client:
        without = await client.post(STREAM, json={"TEXT": "a"})
        bearer = {"authorization": "Bearer workspace key"}
        with_key = await client.post(STREAM, json={"TEXT": "a"}, headers=bearer)
    await state.apps.close()

    assert (without.status_code, with_key.status_code) == (401, 200)
    assert set(without.json()) == {"error"}


async def test_key_that_is_limited_to_names_sees_only_the_models_of_these_names(
    make_state: MakeState, service: FakeService, tmp_path: Path
) -> None:
    """Apps count as adapters do: what a key may not use is not there for it."""
    (tmp_path / "keys").write_text("sk-1 adapters=toy,pirate base=no\n")
    state = make_state(api_keys_file=tmp_path / "keys")
    service.registry.add("pirate")
    service.registry.add("secret")
    folders = [make_app(tmp_path, STREAMING, SCHEMA), make_app(tmp_path, WHOLE, WHOLE_SCHEMA, name="whole")]
    state.apps = Apps(folders, AppsOptions(limits=quick()))
    state.apps.start()
    await until(lambda: state.apps.are_ready)
    async with connect(build_app(state)) as client:
        client.headers["x-api-key"] = "sk-1"
        index = (await client.post("/v2/repository/index")).json()
        used = await client.post(STREAM, json={"TEXT": "a"})
        inputs = [tensor("TEXT", "BYTES", "a"), tensor("text_input", "BYTES", "a")]
        for name in ("whole", "base", "secret"):
            hidden = [
                await client.get(f"/v2/models/{name}"),
                await client.get(f"/v2/models/{name}/ready"),
                await client.post(f"/v2/models/{name}/infer", json={"inputs": inputs}),
            ]
            assert [response.status_code for response in hidden] == [404] * 3
    await state.apps.close()

    assert [entry["name"] for entry in index] == ["pirate", "toy"]
    assert used.status_code == 200


async def test_K20_apps_are_models_with_metadata_and_a_life(
    app_client: httpx.AsyncClient, apps: Apps
) -> None:
    metadata = (await app_client.get("/v2/models/toy")).json()
    index = (await app_client.post("/v2/repository/index")).json()

    assert (metadata["platform"], metadata["versions"]) == ("inferless", ["1"])
    assert metadata["inputs"][:2] == [
        {"name": "TEXT", "datatype": "BYTES", "shape": [1]},
        {"name": "N", "datatype": "INT16", "shape": [1]},
    ]
    assert {entry["name"]: entry["state"] for entry in index} == {
        "base": "READY",
        "toy": "READY",
        "whole": "READY",
    }
    assert (await app_client.get("/v2/models/toy/ready")).json() == {"name": "toy", "ready": True}

    for _ in range(2):
        assert (await app_client.post("/v2/repository/models/toy/unload")).status_code == 200
    assert (await app_client.get("/v2/models/toy/ready")).status_code == 503
    refused = await app_client.post(STREAM, json={"TEXT": "a"})
    assert (refused.status_code, set(refused.json())) == (503, {"error"})
    assert (await app_client.get("/v2/health/ready")).status_code == 200

    for _ in range(2):
        assert (await app_client.post("/v2/repository/models/toy/load")).status_code == 200
    await until(lambda: apps.are_ready)
    assert (await app_client.post(STREAM, json={"TEXT": "a"})).status_code == 200


async def test_app_that_does_not_start_keeps_only_kserves_readiness_waiting(
    state: ServerState, tmp_path: Path
) -> None:
    app = "class InferlessPythonModel:\n    def initialize(self):\n        raise RuntimeError('no weights')\n"
    state.apps = Apps([make_app(tmp_path, app, TEXT)], AppsOptions(limits=quick()))
    state.apps.start()
    async with connect(build_app(state)) as client:
        for path, status in (
            ("/health", 200),
            ("/ready", 200),
            ("/v2/health/live", 200),
            ("/v2/health/ready", 503),
        ):
            assert (await client.get(path)).status_code == status
        worker = state.apps.get("toy")
        assert worker is not None
        await until(lambda: worker.state is AppState.FAILED)
        for path, status in (("/health", 200), ("/ready", 200), ("/v2/health/ready", 503)):
            assert (await client.get(path)).status_code == status
        assert (await client.post(STREAM, json={"TEXT": "a"})).status_code == 503
        assert (await client.post("/v2/models/base/generate", json={"text_input": "Hi"})).status_code == 200
    await state.apps.close()


async def test_apps_take_nothing_while_the_server_goes_down(
    app_client: httpx.AsyncClient, state: ServerState
) -> None:
    state.phase = Phase.DRAINING

    assert (await app_client.post(STREAM, json={"TEXT": "a"})).status_code == 503
