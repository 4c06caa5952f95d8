"""Probes in every phase. Rows C1, C19, L18, Z16."""

import asyncio
import json

import httpx
import pytest

from server.api.app import build_app
from server.api.state import Phase, ServerState
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService

GENERATION = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/generate", {"inputs": "Hi"}),
    ("/generate_stream", {"inputs": "Hi"}),
    ("/", {"inputs": "Hi"}),
    ("/tokenize", {"inputs": "Hi"}),
]


@pytest.mark.parametrize(("path", "body"), GENERATION)
async def test_C19_generation_while_loading_is_503_with_retry_after(
    path: str, body: dict[str, object]
) -> None:
    loading = ServerState(progress=lambda: "weights: 40%")
    async with connect(build_app(loading)) as client:
        response = await client.post(path, json=body)

    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert "weights: 40%" in (error if isinstance(error, str) else error["message"])


async def test_C1_health_answers_while_loading_and_ready_does_not() -> None:
    async with connect(build_app(ServerState())) as client:
        health, ping, ready = [await client.get(path) for path in ("/health", "/ping", "/ready")]
        models = await client.get("/v1/models")

    assert (health.status_code, health.json()) == (200, {"status": "loading"})
    assert ping.status_code == 200
    assert ready.status_code == 503
    assert ready.json()["progress"] == "starting"
    assert int(ready.headers["retry-after"]) >= 1
    assert models.status_code == 503


async def test_Z16_all_is_well_once_the_model_is_up(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).json() == {"status": "ready"}


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.FAILED])
async def test_going_down_is_unhealthy_and_refuses(state: ServerState, phase: Phase) -> None:
    state.phase = phase
    async with connect(build_app(state)) as client:
        health = await client.get("/health")
        chat = await client.post(*GENERATION[0][:1], json=GENERATION[0][1])

    assert health.status_code == 503
    assert health.json()["status"] == phase
    assert health.json()["error_type"] == "healthcheck"
    assert chat.status_code == 503
    assert chat.headers["retry-after"]


async def test_dead_engine_fails_health(service: FakeService, client: httpx.AsyncClient) -> None:
    service.is_alive = False

    assert (await client.get("/health")).status_code == 503
    assert (await client.get("/ready")).status_code == 503


async def test_L18_metrics_version_and_root_answer(client: httpx.AsyncClient) -> None:
    metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"vllm:num_requests_running" in metrics.content
    assert (await client.get("/version")).json() == {"version": "1.2.3"}
    root = await client.get("/")
    assert (root.status_code, root.text) == (200, "Ollama is running")
    assert (await client.head("/")).status_code == 200


async def test_load_counts_requests_under_way(service: FakeService, client: httpx.AsyncClient) -> None:
    service.is_manual = True
    asking = asyncio.create_task(client.post("/generate", json={"inputs": "Hi"}))
    stream = await service.streams.get()

    assert (await client.get("/load")).json() == {"server_load": 1}
    stream.end_without_finish()
    assert json.loads((await asking).content)["error_type"] == "incomplete_generation"
    assert (await client.get("/load")).json() == {"server_load": 0}
