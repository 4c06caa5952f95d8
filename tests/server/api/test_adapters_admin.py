"""vLLM's adapter routes and the list of models. Rows Z17, C2; idempotence as controllers need it."""

import httpx
import pytest

from tests.server.api.fake_service import FakeService

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


async def test_adapter_is_loaded_used_listed_and_unloaded(client: httpx.AsyncClient) -> None:
    loaded = await client.post(LOAD, json={"lora_name": "org/pirate", "lora_path": "/adapters/pirate"})
    used = await client.post("/v1/completions", json={"model": "org/pirate", "prompt": "Hi"})
    listed = await client.get("/v1/models")
    unloaded = await client.post(UNLOAD, json={"lora_name": "org/pirate"})
    gone = await client.post("/v1/completions", json={"model": "org/pirate", "prompt": "Hi"})

    assert loaded.text == "Success: LoRA adapter 'org/pirate' added successfully."
    assert used.json()["model"] == "org/pirate"
    assert [card["id"] for card in listed.json()["data"]] == ["base", "org/pirate"]
    assert unloaded.text == "Success: LoRA adapter 'org/pirate' removed successfully."
    assert gone.status_code == 404


async def test_both_routes_may_be_repeated(client: httpx.AsyncClient) -> None:
    load = {"lora_name": "pirate", "lora_path": "/adapters/pirate"}
    for _ in range(2):
        assert (await client.post(LOAD, json=load)).status_code == 200
    for _ in range(2):
        unloaded = await client.post(UNLOAD, json={"lora_name": "pirate", "lora_int_id": None})
        assert unloaded.status_code == 200
    assert "not loaded" in unloaded.text


async def test_other_content_under_a_known_name_needs_load_inplace(client: httpx.AsyncClient) -> None:
    await client.post(LOAD, json={"lora_name": "pirate", "lora_path": "/adapters/one"})
    other = {"lora_name": "pirate", "lora_path": "/adapters/two"}

    assert (await client.post(LOAD, json=other)).status_code == 400
    assert (await client.post(LOAD, json={**other, "load_inplace": True})).status_code == 200


async def test_Z17_C2_base_comes_first_and_adapters_name_their_parent(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("b")
    service.registry.add("a", root="/adapters/a")
    models = (await client.get("/v1/models")).json()

    assert models["object"] == "list"
    assert [card["id"] for card in models["data"]] == ["base", "a", "b"]
    base, adapter, _ = models["data"]
    assert base["object"] == "model"
    assert (base["created"], base["owned_by"], base["parent"]) == (1764000000, "motet", None)
    assert base["max_model_len"] == 1000
    assert (adapter["parent"], adapter["root"]) == ("base", "/adapters/a")
    assert adapter["revision"] == "rev-/adapters/a"


@pytest.mark.parametrize(
    ("path", "id"),
    [
        ("base", "base"),
        ("other-name", "base"),
        ("default", "base"),
        ("org/a", "org/a"),
        ("org%2Fa", "org/a"),
        ("base:org/a", "org/a"),
    ],
)
async def test_single_models_are_found_by_any_name(
    client: httpx.AsyncClient, service: FakeService, path: str, id: str
) -> None:
    service.registry.add("org/a")

    assert (await client.get(f"/v1/models/{path}")).json()["id"] == id


async def test_unknown_single_model_is_404(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/no/body")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_list_answers_with_a_slash_at_the_end(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/")).json()["object"] == "list"
