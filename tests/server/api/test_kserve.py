"""What KServe bodies for our own models mean, and their answers. Rows K20, U7."""

import json
from typing import Any

import httpx
import pytest

from server.types import FinishReason, SamplingParams
from tests.server.api.fake_service import FakeService, sentence_with_eos, words

GENERATE = "/v2/models/base/generate"
STREAM = "/v2/models/base/generate_stream"
INFER = "/v2/models/base/infer"


def tensor(name: str, datatype: str, *data: object, shape: list[int] | None = None) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": list(data)}


async def frames_of(client: httpx.AsyncClient, body: dict[str, Any], path: str = STREAM) -> list[Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *frames, nothing = response.text.split("\n\n")
    assert nothing == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


async def test_U7_body_of_the_tensorrt_benchmark_streams_text_output(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """As vLLM's load generator sends it; it adds up `text_output` over all frames."""
    service.script = sentence_with_eos("Once", " upon")
    body = {
        "accumulate_tokens": True,
        "text_input": "Hi",
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 8,
        "stream": True,
        "min_length": 8,
    }
    frames = await frames_of(client, body)

    assert "".join(frame["text_output"] for frame in frames) == "Once upon"
    assert all((frame["model_name"], frame["model_version"]) == ("base", "1") for frame in frames)
    assert (service.last.stop.max_tokens, service.last.stop.min_tokens) == (8, 8)
    assert service.last.sampling.is_greedy


async def test_last_frame_carries_the_text_and_details(client: httpx.AsyncClient) -> None:
    *others, last = await frames_of(client, {"text_input": "Hi", "max_tokens": 2})

    assert [set(frame) for frame in others] == [{"model_name", "model_version", "text_output"}]
    assert last["generated_text"] == "Once upon"
    assert last["details"]["generated_tokens"] == 2
    assert list(last) == sorted(last)


async def test_every_parameter_reaches_the_engine_under_the_names_of_both_backends(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    vllm = {
        "max_tokens": 12,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 10,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.1,
        "seed": 7,
        "stop": ["a", "b"],
    }
    other_names = {
        "max_tokens": "max_new_tokens",
        "min_tokens": "min_length",
        "top_p": "runtime_top_p",
        "top_k": "runtime_top_k",
        "seed": "random_seed",
        "stop": "stop_words",
    }
    tensorrt = {other_names.get(name, name): value for name, value in vllm.items()}
    asked = []
    for body in (
        {"text_input": "Hi", "parameters": vllm},
        {"text_input": "Hi", **tensorrt},
        {"text_input": "Hi", "parameters": {"sampling_parameters": json.dumps(vllm)}},
    ):
        assert (await client.post(GENERATE, json=body)).status_code == 200
        asked.append((service.last.sampling, service.last.stop))

    assert asked[0] == asked[1] == asked[2]
    sampling, stop = asked[0]
    assert sampling == SamplingParams(
        temperature=0.5,
        top_k=10,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        seed=7,
    )
    assert (stop.max_tokens, stop.min_tokens, stop.stop) == (12, 3, ("a", "b"))


async def test_values_that_ask_for_nothing_are_accepted(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """What the examples of TensorRT-LLM send along."""
    body = {
        "text_input": "Hi",
        "max_tokens": 5,
        "bad_words": "",
        "stop_words": [""],
        "pad_id": 2,
        "end_id": 2,
        "beam_width": 1,
        "top_p": 0,
        "top_k": 0,
        "return_log_probs": False,
        "made_up": {"x": 1},
    }
    assert (await client.post(GENERATE, json=body)).status_code == 200
    assert service.last.stop.stop == ()
    assert service.last.stop.stop_token_ids == (2,)
    assert (service.last.sampling.top_p, service.last.sampling.top_k) == (1.0, 0)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "text_input"),
        ({"text_input": ""}, "text_input"),
        ({"text_input": 5}, "text_input"),
        ({"text_input": ["a", "b"]}, "text_input"),
        ({"text_input": "x", "max_tokens": 0}, "max_tokens"),
        ({"text_input": "x", "parameters": {"max_tokens": "5"}}, "max_tokens"),
        ({"text_input": "x", "random_seed": -1}, "random_seed"),
        (
            {"text_input": "x", "temperature": 1, "parameters": {"temperature": 1}},
            "temperature is given twice",
        ),
        ({"text_input": "x", "beam_width": 4}, "beam_width"),
        ({"text_input": "x", "bad_words": ["no"]}, "bad_words"),
        ({"text_input": "x", "stop_words": [5]}, "stop"),
        ({"text_input": "x", "end_id": -1}, "end_id"),
        ({"text_input": "x", "sampling_parameters": "[]"}, "object"),
        ({"text_input": "x", "parameters": []}, "parameters"),
        ({"text_input": "x", "id": 5}, "id"),
        ({"text_input": "x", "max_tokens": 100_000}, "max_tokens"),
        ({"text_input": "x", "min_length": 6, "max_tokens": 5}, "min_tokens"),
    ],
    ids=str,
)
async def test_what_is_wrong_is_a_400_that_names_it(
    client: httpx.AsyncClient, service: FakeService, body: dict[str, Any], says: str
) -> None:
    for path in (GENERATE, STREAM):
        response = await client.post(path, json=body)

        assert response.status_code == 400
        assert set(response.json()) == {"error"}
        assert says in response.json()["error"]
    assert service.is_idle


async def test_adapters_are_models_and_their_names_may_hold_slashes(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("team/pirate")
    for path in (
        "/v2/models/team/pirate/generate",
        "/v2/models/team%2Fpirate/generate",
        "/v2/models/team/pirate/versions/1/generate",
    ):
        response = await client.post(path, json={"text_input": "Hi"})

        assert response.json()["model_name"] == "team/pirate"
        assert response.headers["x-adapter-id"] == "team/pirate"
    named = await client.post(GENERATE, json={"text_input": "Hi", "parameters": {"lora_name": "team/pirate"}})
    assert named.headers["x-adapter-id"] == "team/pirate"


async def test_path_and_parameters_may_not_name_two_adapters(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("one")
    service.registry.add("two")
    body = {"text_input": "Hi", "lora_name": "two"}

    assert (await client.post("/v2/models/two/generate", json=body)).status_code == 200
    assert (await client.post("/v2/models/one/generate", json=body)).status_code == 400


@pytest.mark.parametrize("action", ["infer", "generate", "generate_stream"])
async def test_unknown_model_or_version_is_404(client: httpx.AsyncClient, action: str) -> None:
    body = {"text_input": "Hi", "inputs": [tensor("text_input", "BYTES", "Hi")]}
    for model in ("nobody", "base/versions/2"):
        response = await client.post(f"/v2/models/{model}/{action}", json=body)

        assert response.status_code == 404
        assert set(response.json()) == {"error"}


async def test_id_comes_back(client: httpx.AsyncClient) -> None:
    frames = await frames_of(client, {"id": "mine", "text_input": "Hi"})
    infer = {"id": "mine", "inputs": [tensor("text_input", "BYTES", "Hi")]}

    assert {frame["id"] for frame in frames} == {"mine"}
    assert (await client.post(INFER, json=infer)).json()["id"] == "mine"


async def test_prompt_is_shown_only_where_asked_and_never_in_a_stream(client: httpx.AsyncClient) -> None:
    body = {"text_input": "Hi", "exclude_input_in_output": False}

    assert (await client.post(GENERATE, json={"text_input": "Hi"})).json()["text_output"] == "Once upon"
    assert (await client.post(GENERATE, json=body)).json()["text_output"] == "HiOnce upon"
    assert (await client.post(STREAM, json=body)).status_code == 400


async def test_counts_and_the_reason_come_for_those_who_ask(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """Outputs of the vLLM backend; in a stream, counts are those since the frame before."""
    service.script = words("a", "", "b", reason=FinishReason.STOP)
    asked = {"return_finish_reason": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
    frames = await frames_of(client, {"text_input": "Hi", **asked})
    whole = (await client.post(GENERATE, json={"text_input": "Hi", "parameters": asked})).json()

    assert [frame["finish_reason"] for frame in frames] == ["None", "stop"]
    assert [frame["num_output_tokens"] for frame in frames] == [1, 2]
    assert [frame["num_input_tokens"] for frame in frames] == [3, 3]
    assert (whole["finish_reason"], whole["num_input_tokens"], whole["num_output_tokens"]) == ("stop", 3, 3)


async def test_infer_answers_a_tensor_in_the_shape_of_the_prompts(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {
        "inputs": [
            tensor("text_input", "BYTES", "Hi", "You", shape=[2, 1]),
            tensor("max_tokens", "INT32", 5),
            tensor("temperature", "FP32", 0),
            tensor("stop", "BYTES", "a", "b"),
        ],
        "outputs": [{"name": "text_output"}, {"name": "num_output_tokens"}],
    }
    answer = (await client.post(INFER, json=body)).json()

    assert answer == {
        "model_name": "base",
        "model_version": "1",
        "outputs": [
            {"name": "text_output", "datatype": "BYTES", "shape": [2, 1], "data": ["Once upon"] * 2},
            {"name": "num_output_tokens", "datatype": "UINT32", "shape": [2, 1], "data": [2, 2]},
        ],
    }
    assert [service.tokenizer.decode(prompt) for prompt in service.last.prompts] == ["Hi", "You"]
    assert service.last.stop.stop == ("a", "b")
    assert service.last.sampling.is_greedy


async def test_tensors_may_be_nested_as_their_shape_and_are_taken_by_the_other_routes(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    inputs = [
        {**tensor("text_input", "BYTES"), "shape": [1, 1], "data": [["Hi"]]},
        tensor("max_tokens", "UINT8", 5),
    ]

    assert (await client.post(INFER, json={"inputs": inputs})).json()["outputs"][0]["shape"] == [1, 1]
    assert (await client.post(GENERATE, json={"inputs": inputs})).json()["text_output"] == "Once upon"
    assert service.last.stop.max_tokens == 5


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([], "text_input"),
        ([tensor("text_input", "INT8", 5)], "text_input"),
        ([tensor("text_input", "BYTES", "a", shape=[2])], "shape"),
        ([tensor("text_input", "BYTES", 5)], "BYTES"),
        (
            [tensor("text_input", "BYTES", "a"), tensor("max_tokens", "INT8", 300)],
            "INT8 goes from -128 to 127",
        ),
        ([tensor("text_input", "BYTES", "a"), tensor("seed", "UINT64", -1)], "UINT64"),
        ([tensor("text_input", "BYTES", "a"), tensor("max_tokens", "INT32", True)], "INT32"),
        ([tensor("text_input", "BYTES", "a"), tensor("ignore_eos", "BOOL", 1)], "BOOL"),
        ([tensor("text_input", "BYTES", "a"), tensor("text_input", "BYTES", "b")], "twice"),
        ([tensor("text_input", "COMPLEX", "a")], "datatype"),
        ([{"name": "text_input", "datatype": "BYTES", "data": ["a"]}], "shape"),
        ([tensor("text_input", "BYTES", "a", shape=[-1])], "shape"),
        ([tensor("text_input", "BYTES", shape=[2**31 - 1] * 8)], "elements"),
    ],
    ids=str,
)
async def test_wrong_tensors_are_a_400_that_names_them(
    client: httpx.AsyncClient, tensors: list[object], says: str
) -> None:
    response = await client.post(INFER, json={"inputs": tensors})

    assert response.status_code == 400
    assert says in response.json()["error"]


async def test_outputs_that_the_model_has_not_are_refused(client: httpx.AsyncClient) -> None:
    body = {"inputs": [tensor("text_input", "BYTES", "a")], "outputs": [{"name": "logits"}]}

    assert "logits" in (await client.post(INFER, json=body)).json()["error"]


async def test_generation_headers_are_those_of_all_routes(client: httpx.AsyncClient) -> None:
    for path in (GENERATE, STREAM):
        headers = (await client.post(path, json={"text_input": "Hi"})).headers

        assert (headers["x-prompt-tokens"], headers["x-adapter-id"]) == ("3", "__base_model__")
        assert "x-compute-time" in headers


async def test_K20_server_and_models_describe_themselves(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("team/pirate")

    assert (await client.get("/v2")).json() == {
        "name": "motet",
        "version": "1.2.3",
        "extensions": ["generate", "model_repository"],
    }
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True}
    for path, name in (
        ("base", "base"),
        ("other-name", "base"),
        ("team/pirate", "team/pirate"),
        ("team%2Fpirate/versions/1", "team/pirate"),
    ):
        metadata = (await client.get(f"/v2/models/{path}")).json()
        assert (metadata["name"], metadata["versions"]) == (name, ["1"])
        assert {"name": "text_input", "datatype": "BYTES", "shape": [-1]} in metadata["inputs"]
        assert metadata["outputs"][0] == {"name": "text_output", "datatype": "BYTES", "shape": [-1]}
        assert (await client.get(f"/v2/models/{path}/ready")).json() == {"name": name, "ready": True}


@pytest.mark.parametrize(
    "path", ["/v2/models/nobody", "/v2/models/nobody/ready", "/v2/models/base/versions/7/ready"]
)
async def test_unknown_models_have_no_metadata(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)

    assert response.status_code == 404
    assert set(response.json()) == {"error"}


async def test_wrong_method_and_unknown_path_are_json(client: httpx.AsyncClient) -> None:
    assert (await client.get(GENERATE)).status_code == 405
    assert (await client.get("/v2/nothing")).json().keys() == {"error"}
    assert (await client.post("/v2", json={})).json().keys() == {"error"}


async def test_binary_tensors_are_refused_by_name(client: httpx.AsyncClient) -> None:
    """What tritonclient sends unless it is told `binary_data=False`."""
    response = await client.post(INFER, content=b"{}abc", headers={"inference-header-content-length": "2"})

    assert response.status_code == 400
    assert "binary" in response.json()["error"]
