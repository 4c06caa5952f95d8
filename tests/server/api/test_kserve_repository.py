"""Row K20: what is loaded, loading and unloading through KServe's repository, and health while loading."""

import httpx
import pytest

from server.api.state import Phase, ServerState
from tests.server.api.fake_service import FakeService

MODELS = "/v2/repository/models"


async def index(client: httpx.AsyncClient, **body: object) -> list[str]:
    response = await client.post("/v2/repository/index", json=body)
    assert response.status_code == 200
    assert all((entry["version"], entry["state"]) == ("1", "READY") for entry in response.json())
    return [entry["name"] for entry in response.json()]


async def test_K20_adapters_are_loaded_and_unloaded_twice_over(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    wish = {"parameters": {"lora_path": "/adapters/one"}}
    for _ in range(2):
        response = await client.post(f"{MODELS}/team/pirate/load", json=wish)
        assert (response.status_code, response.json()) == (200, {})
    assert await index(client, ready=True) == ["base", "team/pirate"]

    for _ in range(2):
        assert (await client.post(f"{MODELS}/team/pirate/unload")).status_code == 200
    assert await index(client) == ["base"]


async def test_loading_by_name_finds_what_the_registry_finds(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """Without a path: the adapter is loaded as a request for it would."""
    service.registry.add("pirate")

    assert (await client.post(f"{MODELS}/pirate/load")).status_code == 200
    assert (await client.post(f"{MODELS}/base/load", content=b"")).status_code == 200
    assert (await client.post(f"{MODELS}/nobody/load", json={})).status_code == 404
    assert service.is_idle


@pytest.mark.parametrize("path", [5, "", "/elsewhere"])
async def test_wrong_paths_are_refused(client: httpx.AsyncClient, path: object) -> None:
    response = await client.post(f"{MODELS}/x/load", json={"parameters": {"lora_path": path}})

    assert response.status_code == 400
    assert set(response.json()) == {"error"}


async def test_base_model_cannot_be_unloaded(client: httpx.AsyncClient) -> None:
    assert (await client.post(f"{MODELS}/base/unload")).status_code == 400


@pytest.mark.parametrize("action", ["load", "unload"])
async def test_pages_from_elsewhere_may_not_change_the_server(client: httpx.AsyncClient, action: str) -> None:
    response = await client.post(f"{MODELS}/pirate/{action}", headers={"origin": "https://evil.example"})

    assert response.status_code == 403


async def test_health_says_live_before_it_says_ready(client: httpx.AsyncClient, state: ServerState) -> None:
    state.phase = Phase.LOADING

    assert (await client.get("/v2/health/live")).status_code == 200
    assert (await client.get("/v2/health/ready")).status_code == 503
    refused = await client.post("/v2/models/base/generate", json={"text_input": "Hi"})
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
