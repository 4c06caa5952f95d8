"""TuneOS's jobs: what is asked and answered. Rows J1 to J6, J11. Reconnecting is in test_jobs_streams.py."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.api.app import build_app
from server.api.state import Phase, ServerState
from server.errors import BadRequest, Overloaded, Unavailable
from server.types import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService, finish_of, sentence_with_eos, token_event, words

MakeState = Callable[..., ServerState]

INFER, STREAM = "/api/jobs/base/infer", "/api/jobs/base/infer/stream"
ROUTES = [("POST", INFER), ("POST", STREAM), ("GET", STREAM)]


async def ask(client: httpx.AsyncClient, method: str, path: str, fields: dict[str, Any]) -> httpx.Response:
    """As a JSON body, or as a query."""
    if method == "GET":
        return await client.get(path, params=fields)
    return await client.post(path, json=fields)


def events_of(body: str) -> list[dict[str, str]]:
    """Fields of each event, which must be complete."""
    *blocks, rest = body.split("\n\n")
    assert rest == ""
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


def tokens_of(body: str) -> list[str]:
    *tokens, done = [event["data"] for event in events_of(body)]
    assert done == "[DONE]"
    return [json.loads(token)["token"] for token in tokens]


async def test_J1_stream_says_what_the_blocking_answer_says(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = sentence_with_eos("Say", "", " h", "i")
    whole = await client.post(INFER, json={"prompt": "Say hi", "temperature": 0})
    stream = await client.get(
        f"{STREAM}?prompt=Say+hi&temperature=0", headers={"Accept": "text/event-stream"}
    )

    assert stream.status_code == 200
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert tokens_of(stream.text) == ["Say", " h", "i"]
    assert "".join(tokens_of(stream.text)) == whole.json()["response"]
    one, two = service.requests
    assert (one.prompts, one.sampling, one.stop) == (two.prompts, two.sampling, two.stop)


async def test_J2_frames_are_the_wizard_s_and_nothing_beside_them(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = words("Hello", ",", " world")
    stream = await client.get(STREAM, params={"prompt": "x"})

    lines = [line for line in stream.text.splitlines() if line and not line.startswith(("id: ", "retry: "))]
    assert lines == [
        'data: {"token": "Hello"}',
        'data: {"token": ","}',
        'data: {"token": " world"}',
        "data: [DONE]",
    ]


async def test_J10_first_event_alone_says_when_to_come_back(client: httpx.AsyncClient) -> None:
    first, *others = events_of((await client.get(STREAM, params={"prompt": "x"})).text)

    assert first["retry"].isdecimal()
    assert json.loads(first["data"]) == {"token": "Once"}
    assert not any("retry" in event for event in others)


async def test_J3_blocking_answer_is_a_response_and_nothing_else(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {"prompt": "x", "max_new_tokens": 300, "temperature": 0.7}
    answer = await client.post(INFER, json=body)

    assert (answer.status_code, answer.json()) == (200, {"response": "Once upon"})
    assert service.last.stop.max_tokens == 300
    assert answer.headers["x-adapter-id"] == "__base_model__"


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 8193}, "prompt"),
        ({"prompt": "x", "max_new_tokens": 9999}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 2049}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": "many"}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 1.5}, "max_new_tokens"),
        ({"prompt": "x", "temperature": 5.0}, "temperature"),
        ({"prompt": "x", "temperature": -0.1}, "temperature"),
        ({"prompt": "x", "temperature": "warm"}, "temperature"),
        ({"prompt": "x", "temperature": "nan"}, "temperature"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**64}, "seed"),
    ],
)
async def test_J4_wrong_values_are_422_with_a_string_that_names_them(
    client: httpx.AsyncClient,
    service: FakeService,
    method: str,
    path: str,
    fields: dict[str, Any],
    named: str,
) -> None:
    answer = await ask(client, method, path, fields)

    assert answer.status_code == 422
    assert answer.json().keys() == {"detail"}
    assert answer.json()["detail"].startswith(named)
    assert service.requests == []


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_values_at_the_ends_of_their_ranges_are_taken(
    make_state: MakeState, service: FakeService, method: str, path: str
) -> None:
    """T22: a temperature of 0 is greedy."""
    async with connect(build_app(make_state())) as client:
        for fields in (
            {"prompt": "x", "max_new_tokens": 1, "temperature": 2.0, "seed": 0},
            {"prompt": "x" * 500, "max_new_tokens": 499, "temperature": 0, "seed": 2**64 - 1},
        ):
            assert (await ask(client, method, path, fields)).status_code == 200
            assert service.last.sampling == SamplingParams(
                temperature=float(fields["temperature"]), seed=int(fields["seed"])
            )
            assert service.last.stop.max_tokens == fields["max_new_tokens"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b'{"prompt": "a", "prompt": "b"}'])
@pytest.mark.parametrize("path", [INFER, STREAM])
async def test_bodies_that_are_no_objects_are_422(client: httpx.AsyncClient, path: str, body: bytes) -> None:
    answer = await client.post(path, content=body, headers={"content-type": "application/json"})

    assert answer.status_code == 422
    assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize("query", ["prompt=%FF", "prompt=%ed%a0%80", "&".join(["prompt=x"] * 101)])
async def test_queries_that_cannot_be_read_are_422(client: httpx.AsyncClient, query: str) -> None:
    answer = await client.get(f"{STREAM}?{query}")

    assert answer.status_code == 422
    assert "query" in answer.json()["detail"]


async def test_queries_hold_any_text(client: httpx.AsyncClient, service: FakeService) -> None:
    prompt = "a+b c&d=e \u2028 \u732b \U0001f600\n%"
    answer = await client.get(STREAM, params={"prompt": prompt, "unknown": "ignored"})

    assert answer.status_code == 200
    assert "".join(map(chr, service.last.prompts[0][1:])) == prompt


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_J5_unknown_job_is_404_with_a_string(
    client: httpx.AsyncClient, service: FakeService, method: str, path: str
) -> None:
    answer = await ask(client, method, path.replace("base", "nobody"), {"prompt": "x"})

    assert answer.status_code == 404
    assert answer.json() == {"detail": "the model 'nobody' does not exist"}
    assert service.is_idle


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_J5_job_whose_adapter_cannot_be_used_is_400_and_one_not_ready_503(
    client: httpx.AsyncClient,
    service: FakeService,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
) -> None:
    """TuneOS says 400 "Job not complete"."""
    errors = iter(
        [
            BadRequest("the adapter has no adapter_model.safetensors", param="model"),
            Unavailable("adapter 'x' is still loading", param="model", retry_after_s=3),
        ]
    )

    async def resolve(name: str | None, *_: object) -> None:
        raise next(errors)

    monkeypatch.setattr(service, "resolve", resolve)
    broken = await ask(client, method, path.replace("base", "x"), {"prompt": "x"})
    loading = await ask(client, method, path.replace("base", "x"), {"prompt": "x"})

    assert broken.status_code == 400
    assert broken.json() == {"detail": "the adapter has no adapter_model.safetensors"}
    assert (loading.status_code, loading.headers["retry-after"]) == (503, "3")
    assert service.is_idle


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_J6_defaults_are_the_wizard_s(
    client: httpx.AsyncClient, service: FakeService, method: str, path: str
) -> None:
    await ask(client, method, path, {"prompt": "x"})

    assert service.last.stop.max_tokens == 256
    assert service.last.sampling == SamplingParams(temperature=0.7)
    assert "".join(map(chr, service.last.prompts[0])) == "\x01x", "raw, without a chat template"


async def test_operators_default_number_of_tokens_is_for_requests_that_bring_none(
    make_state: MakeState, service: FakeService
) -> None:
    async with connect(build_app(make_state(default_max_tokens=50))) as client:
        await client.post(INFER, json={"prompt": "x"})
        assert service.last.stop.max_tokens == 50
        await client.post(INFER, json={"prompt": "x", "max_new_tokens": 300})
        assert service.last.stop.max_tokens == 300


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("asked", [None, 2048])
async def test_answer_is_cut_to_what_the_prompt_leaves_of_the_context(
    client: httpx.AsyncClient, service: FakeService, method: str, path: str, asked: int | None
) -> None:
    fields: dict[str, Any] = {"prompt": "x" * 899}  # and one token before it
    answer = await ask(client, method, path, fields if asked is None else {**fields, "max_new_tokens": asked})

    assert answer.status_code == 200
    assert service.last.stop.max_tokens == 100


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("num_chars", [999, 4001])
async def test_prompt_that_leaves_nothing_of_the_context_is_422(
    client: httpx.AsyncClient, service: FakeService, method: str, path: str, num_chars: int
) -> None:
    answer = await ask(client, method, path, {"prompt": "x" * num_chars})

    assert answer.status_code == 422
    assert "context" in answer.json()["detail"]
    assert service.is_idle
    assert service.requests == []


@pytest.mark.parametrize(
    ("job", "model"),
    [
        ("pirate", "pirate"),
        ("org/team/pirate", "org/team/pirate"),
        ("org%2Fpirate", "org/pirate"),
        ("infer/stream", "infer/stream"),
        ("base:pirate", "pirate"),
        ("base", None),
        ("other-name", None),
        ("default", None),
    ],
)
async def test_job_ids_are_ids_of_adapters(
    client: httpx.AsyncClient, service: FakeService, job: str, model: str | None
) -> None:
    for name in ("pirate", "org/team/pirate", "org/pirate", "infer/stream"):
        service.registry.add(name)

    whole = await client.post(f"/api/jobs/{job}/infer", json={"prompt": "x"})
    stream = await client.get(f"/api/jobs/{job}/infer/stream?prompt=x")

    assert (whole.status_code, stream.status_code) == (200, 200)
    for request in service.requests:
        assert (request.adapter and request.adapter.name) == model
    assert service.is_idle


async def test_J11_key_may_stand_in_the_query(make_state: MakeState, service: FakeService) -> None:
    async with connect(build_app(make_state(api_key="secret"))) as client:
        without = await client.get(f"{STREAM}?prompt=x")
        wrong = await client.get(f"{STREAM}?prompt=x&api_key=guess")
        right = await client.get(f"{STREAM}?prompt=x&api_key=secret")

    assert (without.status_code, wrong.status_code, right.status_code) == (401, 401, 200)
    assert isinstance(without.json()["detail"], str)
    assert "secret" not in right.text
    assert len(service.requests) == 1


async def test_D19_head_begins_nothing(client: httpx.AsyncClient, service: FakeService) -> None:
    head = await client.head(f"{STREAM}?prompt=x")
    wrong = await client.head(STREAM)

    assert (head.status_code, wrong.status_code) == (200, 422)
    assert head.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert head.content == b""
    assert service.requests == []


async def test_D19_no_answer_may_be_stored(client: httpx.AsyncClient, state: ServerState) -> None:
    """Refusals too: a shared cache would give them to the next one."""
    answers = [
        await client.get(f"{STREAM}?prompt=x"),
        await client.head(f"{STREAM}?prompt=x"),
        await client.post(INFER, json={"prompt": "x"}),
        await client.get(STREAM),
        await client.get("/api/jobs/nobody/infer/stream?prompt=x"),
        await client.get(f"{STREAM}?prompt=x", headers={"Last-Event-ID": "gen9:1"}),
    ]
    state.phase = Phase.DRAINING
    answers.append(await client.get(f"{STREAM}?prompt=x"))

    assert [answer.status_code for answer in answers] == [200, 200, 200, 422, 404, 204, 503]
    assert {answer.headers["cache-control"] for answer in answers} == {"no-store, no-transform"}


async def test_head_of_a_stream_is_that_of_all_streams(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("pirate")
    stream = await client.get("/api/jobs/pirate/infer/stream?prompt=Hi")

    assert stream.headers["x-accel-buffering"] == "no"
    assert stream.headers["x-adapter-id"] == "pirate"
    assert stream.headers["x-adapter-source"] == "local"
    assert stream.headers["x-prompt-tokens"] == "3"
    assert stream.headers["x-compute-time"] == "0"
    assert "connection" not in stream.headers
    assert "content-length" not in stream.headers


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_failures_before_the_first_token_are_true_errors_with_detail(
    client: httpx.AsyncClient, service: FakeService, method: str, path: str
) -> None:
    def fails(request: GenerationRequest) -> list[TokenEvent]:
        finish = finish_of(request, "", 0, reason=FinishReason.ERROR, error="logits were not finite")
        return [TokenEvent(0, "", None, finish)]

    service.script = fails
    failed = await ask(client, method, path, {"prompt": "x"})
    service.refusal = Overloaded("the queue is full", retry_after_s=7)
    full = await ask(client, method, path, {"prompt": "x"})

    assert (failed.status_code, failed.json()) == (500, {"detail": "logits were not finite"})
    assert (full.status_code, full.json()) == (429, {"detail": "the queue is full"})
    assert full.headers["retry-after"] == "7"
    assert service.is_idle


async def test_failure_in_the_stream_is_an_error_and_then_the_end(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    def breaks(request: GenerationRequest) -> list[TokenEvent]:
        finish = finish_of(request, "Once", 1, reason=FinishReason.ABORT, error="the server is shutting down")
        return [token_event("Once"), TokenEvent(0, "", None, finish)]

    service.script = breaks
    stream = await client.get(f"{STREAM}?prompt=x")

    assert [event["data"] for event in events_of(stream.text)] == [
        '{"token": "Once"}',
        '{"error": "the server is shutting down"}',
        "[DONE]",
    ]
    assert service.is_idle


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", INFER, "POST, OPTIONS"),
        ("PUT", STREAM, "GET, HEAD, POST, OPTIONS"),
        ("DELETE", INFER, "POST, OPTIONS"),
    ],
)
async def test_other_methods_are_405_with_detail(
    client: httpx.AsyncClient, method: str, path: str, allow: str
) -> None:
    answer = await client.request(method, path)

    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize(
    "path", ["/api/jobs", "/api/jobs/base", "/api/jobs/base/infer/", "/api/jobs/base/inferno"]
)
async def test_other_paths_are_404_with_detail(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)

    assert answer.status_code == 404
    assert isinstance(answer.json()["detail"], str)


async def test_while_the_model_loads_jobs_wait(make_state: MakeState) -> None:
    state = make_state()
    state.phase, state.service = Phase.LOADING, None
    async with connect(build_app(state)) as client:
        for method, path in ROUTES:
            answer = await ask(client, method, path, {"prompt": "x"})
            assert answer.status_code == 503
            assert "loading" in answer.json()["detail"]
            assert answer.headers["retry-after"]
