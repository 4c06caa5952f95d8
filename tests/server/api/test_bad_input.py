"""Whatever is sent, the answer is a 4xx in the shape of the route that names the parameter; nothing is held
afterwards, and the next request is served. Rows Z15, L10, L13, L14, Z13.
"""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.server.api.fake_service import FakeService

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]

# (what is changed in a good body, the parameter that the refusal names)
OPENAI_CASES: list[tuple[dict[str, object], str]] = [
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"min_p": 1.01}, "min_p"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [0x110000]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"chunk_by": "page"}}, "stream_options.chunk_by"),
    ({"stream": True, "stream_options": {"chunk_size": 0}}, "stream_options.chunk_size"),
    ({"model": 5}, "model"),
    ({"lora_id": ["a"]}, "lora_id"),
    ({"model": "pirate", "lora_id": "other"}, "lora_id"),
    ({"ignore_eos": "true"}, "ignore_eos"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_json": {}}, "guided_json"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"bad_words": ["a"]}, "bad_words"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"typical_p": 0}, "typical_p"),
    ({"typical_p": 1.5}, "typical_p"),
    ({"adapter_source": "pbase"}, "adapter_source"),
    ({"adapter_source": "ftp"}, "adapter_source"),
    ({"adapter_source": 5}, "adapter_source"),
    ({"api_token": 5}, "api_token"),
    ({"api_token": "x" * 4097}, "api_token"),
    ({"lora": "pirate"}, "lora"),
    ({"lora": {"name": "pirate"}}, "lora"),
    ({"lora": ["pirate"]}, "lora[0]"),
    ({"lora": [{"name": "pirate"}, {"id": 0, "scale": 1}]}, "lora[1].name"),
    ({"lora": [{"name": ""}]}, "lora[0].name"),
    ({"lora": [{"name": "x" * 1025}]}, "lora[0].name"),
    ({"lora": [{"name": "pirate", "scale": "1"}]}, "lora[0].scale"),
    ({"lora": [{"name": "pirate", "scale": True}]}, "lora[0].scale"),
    ({"lora": [{"name": "pirate", "scale": 101}]}, "lora[0].scale"),
    ({"lora": [{"name": "pirate", "scale": -100.5}]}, "lora[0].scale"),
    ({"lora": [{"name": "pirate"}] * 9}, "lora"),
    ({"lora": [{"name": "pirate"}, {"name": "base"}]}, "lora[1].name"),
    ({"lora": [{"name": "pirate"}], "model": "other"}, "lora"),
    ({"lora": [{"name": "pirate"}], "lora_id": "pirate"}, "lora"),
    ({"lora": [], "model": "pirate"}, "lora"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"priority": 1}, "priority"),
]

CHAT_CASES: list[tuple[dict[str, object], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [[]]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "tool", "content": "first"}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"echo": True}, "echo"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"max_tokens": 1000}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 1001}]}, "messages"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"continue_final_message": True}, "continue_final_message"),
]

COMPLETION_CASES: list[tuple[dict[str, object], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [0x110000]}, "prompt"),
    ({"prompt": [1] * 1000}, "prompt"),
    ({"prompt": [1] * 200_000}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": ["a", ["b"]]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [[[1]]]}, "prompt"),
    ({"prompt": [[1], [-1]]}, "prompt"),
    ({"prompt": ["a", "x" * 1001]}, "prompt"),
    ({"prompt": [[1], [1] * 1000]}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
    ({"prompt": ["a", ""], "add_special_tokens": False}, "prompt"),
    ({"max_tokens": 0, "echo": False}, "max_tokens"),
    ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
    ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
    ({"prompt": "", "add_special_tokens": False}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": "1"}, "logprobs"),
    ({"suffix": "."}, "suffix"),
    ({"max_tokens": 999}, "prompt"),
]

# (what is changed in a good merge of two adapters, what the refusal says)
MERGE_CASES: list[tuple[dict[str, object], str]] = [
    ({"ids": []}, "at least one adapter ID must be provided when setting `adapters`"),
    ({"ids": ["pirate"] * 9, "weights": [1] * 9}, "`ids` supports up to 8 adapters. Given: 9"),
    ({"ids": "pirate"}, "merged_adapters.ids"),
    ({"ids": ["pirate", 5]}, "merged_adapters.ids[1]"),
    ({"weights": [1]}, "number of adapter IDs must match number of adapter weights"),
    ({"weights": []}, "number of adapter IDs must match number of adapter weights"),
    ({"weights": [1, "1"]}, "merged_adapters.weights[1]"),
    ({"weights": [1, 101]}, "`weights` must be >= -100.0 and <= 100.0"),
    ({"ids": ["pirate", "base"]}, "base model adapter cannot be merged"),
    ({"ids": ["pirate", "__base_model__"]}, "base model adapter cannot be merged"),
    (
        {"merge_strategy": "svd"},
        "`merge_strategy` must be one of linear, ties, dare_linear, dare_ties",
    ),
    ({"majority_sign_method": "sum"}, "`majority_sign_method` must be one of total, frequency"),
    ({"merge_strategy": "ties"}, "`density` must be > 0.0 and <= 1.0 with ties"),
    ({"merge_strategy": "ties", "density": 0.0}, "`density` must be > 0.0 and <= 1.0 with ties. Given: 0"),
    ({"merge_strategy": "dare_ties", "density": 1.5}, "`density` must be > 0.0 and <= 1.0 with dare_ties"),
    ({"density": -0.1}, "`density` must be >= 0.0 and <= 1.0 with linear. Given: -0.1"),
    ({"density": "0.5"}, "merged_adapters.density"),
]

LORAX_CASES: list[tuple[dict[str, object], str]] = [
    ({"inputs": 5}, "inputs"),
    ({"inputs": None}, "inputs"),
    ({"inputs": ""}, "`inputs` cannot be empty"),
    ({"inputs": "x" * 1001}, "`inputs` must have less than 1000 tokens. Given: 1002"),
    ({"parameters": 5}, "parameters"),
    ({"parameters": []}, "parameters"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"max_new_tokens": "5"}, "max_new_tokens"),
    (
        {"max_new_tokens": 1000},
        "must be <= 1000. Given: 3 `inputs` tokens and 1000 `max_new_tokens`",
    ),
    ({"temperature": -1.0}, "`temperature` must be non-negative"),
    ({"temperature": "1"}, "temperature"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 2.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 3.0}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": -3.0}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"seed": -1}, "`seed`"),
    ({"do_sample": "yes"}, "do_sample"),
    ({"stop": ["a"] * 17}, "`stop` supports up to 16 stop sequences. Given: 17"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 1000. Given: 0"),
    ({"best_of": 0}, "`best_of` "),
    ({"best_of": 2}, "`best_of` "),
    ({"watermark": True}, "watermark"),
    ({"grammar": {"type": "json"}}, "grammar"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_n_tokens": 21}, "`top_n_tokens` must be >= 0 and <= 20. Given: 21"),
    *(
        ({"merged_adapters": {"ids": ["pirate", "other"], "weights": [1, 1], **change}}, said)
        for change, said in MERGE_CASES
    ),
    ({"merged_adapters": ["pirate"]}, "merged_adapters"),
    ({"merged_adapters": {}}, "merged_adapters.ids"),
    ({"merged_adapters": {"ids": ["pirate"]}, "lora": []}, "at most one of `lora` and `merged_adapters`"),
    ({"lora": [{"name": "pirate"}], "adapter_id": "other"}, "adapter_id"),
    ({"lora": [{"name": "pirate", "scale": 1000}]}, "lora[0].scale"),
    (
        {"merged_adapters": {"ids": ["a"]}, "adapter_id": "pirate"},
        "at most one of `adapter_id` or `adapters` may be provided",
    ),
    ({"adapter_source": "pbase"}, "adapter_source pbase is not supported by this server"),
    ({"adapter_source": "ftp"}, "adapter_source: ftp is not one of local, hub, s3"),
    ({"api_token": ["t"]}, "api_token"),
    ({"adapter_id": 5}, "adapter_id"),
    ({"return_k_alternatives": 21}, "`return_k_alternatives`"),
]

BROKEN_BODIES: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b"  \n", "empty"),
    (b"{", "not valid JSON"),
    (b"[]", "JSON object"),
    (b'"text"', "JSON object"),
    (b"null", "JSON object"),
    (b'{"a":1}{', "not valid JSON"),
    (b'{"a":NaN}', "NaN"),
    (b'{"a":-Infinity}', "-Infinity"),
    (b'{"a":1e999}', "range"),
    (b'{"a":' + b"9" * 5000 + b"}", "digits"),
    (b'{"a":1,"a":2}', "twice"),
    (b'{"messages":"\xff\xfe"}', "UTF-8"),
    (b'{"messages":"\\ud800"}', "surrogate"),
    ('{"a":1}'.encode("utf-16"), "UTF-8"),
    (b'{"a":' * 100_000, "nested"),
    (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
]


@pytest.fixture(autouse=True)
def nothing_is_held_afterwards(service: FakeService) -> Iterator[None]:
    service.registry.add("pirate")
    service.registry.add("other")
    yield
    assert service.is_idle


def good_body(path: str) -> dict[str, object]:
    if path == CHAT:
        return {"messages": USER}
    return {"prompt": "Hi"} if path == COMPLETIONS else {"inputs": "Hi"}


async def serves_on(client: httpx.AsyncClient, service: FakeService, path: str) -> None:
    """No refused request reached the engine, and a good one still does."""
    assert service.requests == []
    assert (await client.post(path, json=good_body(path))).status_code == 200


def assert_openai_error(response: httpx.Response, status: int, param: str | None, code: str = "") -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    if code:
        assert error["code"] == code


def assert_lorax_error(response: httpx.Response, status: int, text: str, kind: str = "validation") -> None:
    assert response.status_code == status
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error_type"] == kind
    assert text in response.json()["error"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("change", "param"), OPENAI_CASES, ids=lambda case: str(case)[:60])
async def test_openai_routes_name_the_wrong_parameter(
    client: httpx.AsyncClient, service: FakeService, path: str, change: dict[str, object], param: str
) -> None:
    """Z15."""
    response = await client.post(path, json={**good_body(path), **change})

    assert_openai_error(response, 400, param)
    await serves_on(client, service, path)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "param"), CHAT_CASES, ids=lambda case: str(case)[:60])
async def test_chat_names_the_wrong_parameter(
    client: httpx.AsyncClient, service: FakeService, change: dict[str, object], param: str, stream: bool
) -> None:
    """C6: and the part of a message that is no text."""
    response = await client.post(CHAT, json={"messages": USER, "stream": stream, **change})

    assert_openai_error(response, 400, param)
    await serves_on(client, service, CHAT)


@pytest.mark.parametrize(("change", "param"), COMPLETION_CASES, ids=lambda case: str(case)[:60])
async def test_completions_name_the_wrong_parameter(
    client: httpx.AsyncClient, service: FakeService, change: dict[str, object], param: str
) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "Hi", **change})

    assert_openai_error(response, 400, param)
    await serves_on(client, service, COMPLETIONS)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(("change", "text"), LORAX_CASES, ids=lambda case: str(case)[:60])
async def test_L13_L14_lorax_routes_say_what_is_wrong(
    client: httpx.AsyncClient, service: FakeService, path: str, change: dict[str, object], text: str
) -> None:
    body: dict[str, object] = {"inputs": "Hi"}
    if change.keys() <= {"inputs", "parameters"}:
        body |= change
    else:
        body["parameters"] = change
    response = await client.post(path, json=body)

    assert_lorax_error(response, 422, text)
    assert response.json()["error"].startswith("Input validation error: ")
    await serves_on(client, service, path)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate", "/generate_stream", "/", "/tokenize"])
@pytest.mark.parametrize(("raw", "text"), BROKEN_BODIES, ids=lambda case: str(case)[:30])
async def test_broken_bodies_are_refused(
    client: httpx.AsyncClient, service: FakeService, path: str, raw: bytes, text: str
) -> None:
    response = await client.post(path, content=raw, headers={"content-type": "application/json"})

    if path.startswith("/v1"):
        assert_openai_error(response, 400, "a" if text == "twice" else None)
        assert text in response.json()["error"]["message"]
    else:
        assert_lorax_error(response, 422, text)
    await serves_on(client, service, path if path != "/tokenize" else CHAT)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "name", ["nobody", "../../etc/passwd", "/etc/passwd", "a\x00b", "pirate/", "é" * 500]
)
async def test_L10_Z13_unknown_models_are_404_and_never_the_base(
    client: httpx.AsyncClient, service: FakeService, name: str, stream: bool
) -> None:
    chat = await client.post(CHAT, json={"model": name, "messages": USER, "stream": stream})
    by_lora_id = await client.post(CHAT, json={"lora_id": name, "messages": USER, "stream": stream})
    completion = await client.post(COMPLETIONS, json={"model": name, "prompt": "Hi", "stream": stream})
    path = "/generate_stream" if stream else "/generate"
    lorax = await client.post(path, json={"inputs": "Hi", "parameters": {"adapter_id": name}})

    for response in (chat, by_lora_id, completion):
        assert_openai_error(response, 404, "model", "model_not_found")
    assert_lorax_error(lorax, 404, "", "adapter_not_found")
    await serves_on(client, service, CHAT)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate", "/generate_stream", "/"])
async def test_prompt_of_2_mb_is_refused_before_it_is_tokenised(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    text = "word " * 400_000
    body = {CHAT: {"messages": [{"role": "user", "content": text}]}, COMPLETIONS: {"prompt": text}}
    response = await client.post(path, json=body.get(path, {"inputs": text}))

    if path.startswith("/v1"):
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert_lorax_error(response, 422, "context")
    assert service.tokenizer.num_encoded == 0
    await serves_on(client, service, path)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate", "/tokenize", "/v1/load_lora_adapter"])
async def test_body_beyond_8_mib_is_413(client: httpx.AsyncClient, service: FakeService, path: str) -> None:
    response = await client.post(path, content=b" " * (8 * 2**20 + 1))

    assert response.status_code == 413
    if path.startswith("/v1"):
        assert response.json()["error"]["code"] == "payload_too_large"
    else:
        assert response.json()["error_type"] == "payload_too_large"
    await serves_on(client, service, CHAT)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
async def test_openai_routes_take_json_only(
    client: httpx.AsyncClient, service: FakeService, kind: str
) -> None:
    raw = json.dumps({"messages": USER}).encode()
    response = await client.post(CHAT, content=raw, headers={"content-type": kind})

    assert_openai_error(response, 400, None)
    assert "Content-Type" in response.json()["error"]["message"]
    await serves_on(client, service, CHAT)


@pytest.mark.parametrize("kind", [None, "application/json; charset=utf-8", "application/vnd.x+json"])
async def test_content_type_may_be_absent_or_any_json(
    client: httpx.AsyncClient, service: FakeService, kind: str | None
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    raw = json.dumps({"messages": USER}).encode()

    assert (await client.post(CHAT, content=raw, headers=headers)).status_code == 200


async def test_lorax_routes_also_take_what_curl_sends_by_default(client: httpx.AsyncClient) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    image = {"content-type": "image/png"}

    assert (await client.post("/generate", content=b'{"inputs":"Hi"}', headers=form)).status_code == 200
    refused = await client.post("/generate", content=b'{"inputs":"Hi"}', headers=image)
    assert_lorax_error(refused, 415, "Content-Type", "unsupported_media_type")


@pytest.mark.parametrize(
    "body",
    [
        {"lora_name": "x"},
        {"lora_path": "/adapters/x"},
        {"lora_name": "", "lora_path": "/adapters/x"},
        {"lora_name": 5, "lora_path": "/adapters/x"},
        {"lora_name": "base", "lora_path": "/adapters/x"},
        {"lora_name": "default", "lora_path": "/adapters/x"},
        {"lora_name": "x\n", "lora_path": "/adapters/x"},
        {"lora_name": "x", "lora_path": "../../etc/passwd"},
        {"lora_name": "x", "lora_path": "/adapters/x", "load_inplace": "yes"},
        {"lora_name": "pirate", "lora_path": "/adapters/different"},
    ],
)
async def test_bad_adapter_loads_are_400(
    client: httpx.AsyncClient, service: FakeService, body: dict[str, object]
) -> None:
    before = service.registry.list()
    response = await client.post("/v1/load_lora_adapter", json=body)

    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("lora_name", "lora_path", "load_inplace")
    assert service.registry.list() == before
    await serves_on(client, service, CHAT)
