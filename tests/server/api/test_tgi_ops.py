"""L18: what LoRAX and TGI answer besides generating: /info, /startup, tokens of texts and chats."""

import json

import httpx
import pytest

from server.api.app import build_app
from server.api.state import ServerState
from server.errors import Overloaded, ServeError, Unavailable
from server.types import FinishReason, GenerationRequest, TokenEvent
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService, finish_of, words

LORAX_INFO = """
    model_id model_sha model_dtype model_device_type model_pipeline_tag max_concurrent_requests max_best_of
    max_stop_sequences max_input_length max_total_tokens waiting_served_ratio max_batch_total_tokens
    max_waiting_tokens validation_workers eager_prefill version sha docker_label request_logger_url
"""
TGI_INFO = """
    model_id model_sha model_pipeline_tag max_concurrent_requests max_best_of max_stop_sequences
    max_input_tokens max_total_tokens validation_workers max_client_batch_size router version sha docker_label
"""
# Strings and counts in the clients' own types; what may be null there may be null here.
NULLABLE = {"model_sha", "model_pipeline_tag", "sha", "docker_label", "request_logger_url"}


@pytest.mark.parametrize("fields", [LORAX_INFO, TGI_INFO], ids=["lorax", "tgi"])
async def test_L18_info_has_every_field_of_both_servers(client: httpx.AsyncClient, fields: str) -> None:
    info = (await client.get("/info")).json()

    assert set(fields.split()) <= set(info)
    assert {name for name in fields.split() if info[name] is None} <= NULLABLE


async def test_L18_info_tells_the_limits_that_hold(client: httpx.AsyncClient, state: ServerState) -> None:
    info = (await client.get("/info")).json()

    assert (info["model_id"], info["model_dtype"], info["model_device_type"]) == (
        "base",
        "torch.float32",
        "cpu",
    )
    assert info["max_total_tokens"] == 1000
    assert info["max_input_length"] == info["max_input_tokens"] == 999
    assert info["max_batch_total_tokens"] == 64000
    assert info["max_concurrent_requests"] == state.options.max_prompts
    assert info["version"] == "1.2.3"

    most = {"best_of": info["max_best_of"], "do_sample": True, "stop": ["x"] * info["max_stop_sequences"]}
    assert (await client.post("/generate", json={"inputs": "Hi", "parameters": most})).status_code == 200
    for name, more in [("best_of", info["max_best_of"] + 1), ("stop", ["x"] * 17)]:
        body = {"inputs": "Hi", "parameters": {**most, name: more}}
        assert (await client.post("/generate", json=body)).status_code == 422


# --- GET /startup ---------------------------------------------------------------------------------------


async def test_L18_startup_generates_one_token(client: httpx.AsyncClient, service: FakeService) -> None:
    service.script = words("I")
    response = await client.get("/startup")

    assert response.status_code == 200
    assert (service.last.stop.max_tokens, service.last.n, service.last.adapter) == (1, 1, None)
    assert service.is_idle


async def test_startup_is_503_while_loading() -> None:
    async with connect(build_app(ServerState(progress=lambda: "weights: 40%"))) as client:
        response = await client.get("/startup")

    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error_type"] == "unavailable"


async def test_startup_without_text_has_failed(client: httpx.AsyncClient, service: FakeService) -> None:
    service.script = words("")
    response = await client.get("/startup")

    assert response.status_code == 500
    assert response.json() == {"error": "Empty generation", "error_type": "failed healthcheck"}
    assert service.is_idle


@pytest.mark.parametrize(
    ("refusal", "kind"), [(Overloaded("full"), "overloaded"), (Unavailable("draining"), "unavailable")]
)
async def test_startup_of_a_server_that_refuses_is_500(
    client: httpx.AsyncClient, service: FakeService, refusal: ServeError, kind: str
) -> None:
    service.refusal = refusal
    response = await client.get("/startup")

    assert (response.status_code, response.json()["error_type"]) == (500, kind)


async def test_startup_of_an_engine_that_fails_is_500(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    def failing(request: GenerationRequest) -> list[TokenEvent]:
        end = finish_of(request, "", 0, reason=FinishReason.ERROR, error="out of memory")
        return [TokenEvent(0, "", None, end)]

    service.script = failing
    response = await client.get("/startup")

    assert response.status_code == 500
    assert response.json() == {
        "error": "Request failed during generation: out of memory",
        "error_type": "generation",
    }
    assert service.is_idle


# --- Tokens ---------------------------------------------------------------------------------------------


async def test_L18_tokenize_gives_ids_and_offsets(client: httpx.AsyncClient) -> None:
    with_bos = (await client.post("/tokenize", json={"inputs": "Hi"})).json()
    plain = (await client.post("/tokenize", json={"inputs": "Hi", "add_special_tokens": False})).json()

    assert [token["id"] for token in with_bos] == [1, 72, 105]
    assert plain == [
        {"id": 72, "text": "H", "start": 0, "stop": 1},
        {"id": 105, "text": "i", "start": 1, "stop": 2},
    ]


async def test_tokenize_takes_the_request_that_would_generate(client: httpx.AsyncClient) -> None:
    """TGI's body is that of /generate."""
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 5, "watermark": True}}

    assert len((await client.post("/tokenize", json=body)).json()) == 3


async def test_tokenize_works_on_long_texts(client: httpx.AsyncClient) -> None:
    assert len((await client.post("/tokenize", json={"inputs": "x" * 3900})).json()) == 3901


async def test_chat_tokenize_gives_the_prompt_of_a_chat(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {"model": "tgi", "messages": [{"role": "user", "content": "Hi"}]}
    answer = (await client.post("/chat_tokenize", json=body)).json()
    await client.post("/v1/chat/completions", json=body)

    assert answer["templated_text"] == "<user>Hi<assistant>"
    assert tuple(token["id"] for token in answer["tokenize_response"]) == service.last.prompts[0]
    assert answer["tokenize_response"][0] == {"id": ord("<"), "text": "<", "start": 0, "stop": 1}


async def test_chat_tokenize_works_on_long_chats(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 3900}]}

    assert len((await client.post("/chat_tokenize", json=body)).json()["tokenize_response"]) > 3900


async def test_detokenize_undoes_tokenize(client: httpx.AsyncClient) -> None:
    tokens = (await client.post("/tokenize", json={"inputs": "H\u00e9!"})).json()
    answer = await client.post("/detokenize", json={"tokens": [token["id"] for token in tokens]})

    assert answer.json() == {"prompt": "\x01H\u00e9!"}


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/tokenize", {}, "inputs: field required"),
        ("/tokenize", {"inputs": ["a", "b"]}, "inputs: input should be a valid string"),
        ("/tokenize", {"inputs": "x" * 4001}, "the prompt has 4001 characters"),
        ("/chat_tokenize", {"messages": []}, "messages: "),
        ("/chat_tokenize", {"messages": [{"role": "user", "content": "x" * 4001}]}, "the prompt has "),
        ("/chat_tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools is not"),
        ("/detokenize", {}, "tokens: "),
        ("/detokenize", {"tokens": "Hi"}, "tokens: input should be a list of token ids"),
        ("/detokenize", {"tokens": [1, True]}, "tokens: input should be a list of token ids"),
        ("/detokenize", {"tokens": [-1]}, "tokens: -1 is not a token id"),
        ("/detokenize", {"tokens": [0x110000]}, "tokens: 1114112 is not a token id"),
        ("/detokenize", {"tokens": [1] * 1001}, "`tokens` must have 1000 tokens at most. Given: 1001"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_token_routes_say_what_is_wrong(
    client: httpx.AsyncClient, path: str, body: dict[str, object], text: str
) -> None:
    response = await client.post(path, json=body)

    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert response.json()["error"].startswith(f"Input validation error: {text}")


async def test_chat_that_the_template_refuses_is_a_template_error(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "tool", "content": "first"}]}
    response = await client.post("/chat_tokenize", json=body)

    assert response.status_code == 422
    assert response.json()["error_type"] == "template_error"
    assert "tool comes first" in response.json()["error"]


@pytest.mark.parametrize("path", ["/tokenize", "/chat_tokenize", "/detokenize"])
async def test_token_routes_take_what_curl_sends_by_default(client: httpx.AsyncClient, path: str) -> None:
    body = {"inputs": "Hi", "messages": [{"role": "user", "content": "Hi"}], "tokens": [72]}
    form = {"content-type": "application/x-www-form-urlencoded"}

    assert (await client.post(path, content=json.dumps(body), headers=form)).status_code == 200
    assert (await client.post(path, content=b"{}", headers={"content-type": "image/png"})).status_code == 415
