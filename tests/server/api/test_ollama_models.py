"""Ollama's lists of models, and what it says when models are to be fetched or changed. Row C11.

Their bytes are in test_ollama_golden.py.
"""

import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import httpx
import pytest

from server.api.app import build_app
from server.api.state import Phase, ServerState
from server.types import SamplingDefaults
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService


async def test_C11_tags_are_the_base_and_then_its_adapters(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("pirate")
    service.registry.add("org/knight", root="/adapters/two")
    models = (await client.get("/api/tags")).json()["models"]

    assert [model["name"] for model in models] == ["base", "org/knight", "pirate"]
    assert [model["model"] for model in models] == ["base", "org/knight", "pirate"]
    assert [model["details"]["parent_model"] for model in models] == ["", "base", "base"]
    assert all(len(model["digest"]) == 64 for model in models)  # the command line shows the first twelve
    assert len({model["digest"] for model in models}) == 3
    assert [model["size"] for model in models] == [4938268, 1000, 1000]
    assert datetime.fromisoformat(models[0]["modified_at"]).timestamp() == 1764000000


async def test_every_name_in_tags_can_be_used(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    for model in (await client.get("/api/tags")).json()["models"]:
        for name in (model["name"], f"{model['name']}:latest"):
            body = {"model": name, "prompt": "Hi", "stream": False}
            assert (await client.post("/api/generate", json=body)).status_code == 200
            assert (await client.post("/api/show", json={"model": name})).status_code == 200


async def test_ps_lists_what_is_in_memory(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    service.registry.add("absent")
    service.registry.evicted.add("absent")
    models = (await client.get("/api/ps")).json()["models"]

    assert [model["name"] for model in models] == ["base", "pirate"]
    assert all(model["context_length"] == 1000 and model["size_vram"] == 0 for model in models)
    assert datetime.fromisoformat(models[0]["expires_at"]).year > 2100


async def test_on_a_gpu_all_of_it_is_there(client: httpx.AsyncClient, service: FakeService) -> None:
    service.card = replace(service.card, compute_type="gpu", device="cuda:0", dtype="bfloat16")
    model = (await client.get("/api/ps")).json()["models"][0]

    assert model["size_vram"] == model["size"] == 4938268
    assert model["details"]["quantization_level"] == "BF16"


async def test_show_describes_a_model(client: httpx.AsyncClient, service: FakeService) -> None:
    defaults = SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.1)
    service.card = replace(service.card, generation_defaults=defaults, num_parameters=8_030_000_000)
    shown = (await client.post("/api/show", json={"model": "base"})).json()

    assert shown["template"] == "{{ messages }}"
    assert [line.split() for line in shown["parameters"].splitlines()] == [
        ["temperature", "0.6"],
        ["top_k", "20"],
        ["repeat_penalty", "1.1"],
    ]
    assert "PARAMETER top_k 20" in shown["modelfile"]
    assert shown["details"]["parameter_size"] == "8.0B"
    assert shown["capabilities"] == ["completion"]
    family = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{family}.context_length"] == 1000


async def test_show_of_an_adapter_names_its_base(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    shown = (await client.post("/api/show", json={"name": "pirate:latest", "verbose": True})).json()

    assert shown["details"]["parent_model"] == "base"
    assert shown["modelfile"].splitlines() == ["FROM base", "ADAPTER pirate"]
    assert shown["model_info"]["adapter.lora.rank"] == 8


async def test_a_model_without_a_template_has_none_to_show(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.tokenizer.chat_template = None

    assert (await client.post("/api/show", json={"model": "base"})).json()["template"] == ""


@pytest.mark.parametrize("path", ["/api/show", "/api/pull"])
async def test_a_model_that_is_not_here_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"model": "nobody:latest"})

    assert response.status_code == 404
    assert response.json()["error"].startswith("model 'nobody:latest' not found")


@pytest.mark.parametrize("path", ["/api/show", "/api/pull"])
@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": 1}, {"model": "x" * 513}])
async def test_which_model_must_be_said(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    response = await client.post(path, json=body)

    assert response.status_code == 400
    assert "model" in response.json()["error"]


async def test_pulling_what_is_here_succeeds(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    streamed = await client.post("/api/pull", json={"model": "pirate:latest"})
    whole = await client.post("/api/pull", json={"name": "base", "stream": False})

    assert [json.loads(line)["status"] for line in streamed.text.splitlines()] == [
        "pulling manifest",
        "success",
    ]
    assert whole.json() == {"status": "success"}
    assert service.is_idle


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("POST", "/api/push"),
        ("DELETE", "/api/delete"),
    ],
)
async def test_models_are_not_changed_at_a_clients_wish(
    client: httpx.AsyncClient, service: FakeService, method: str, path: str
) -> None:
    service.registry.add("pirate")
    response = await client.request(method, path, json={"model": "pirate"})

    assert response.status_code == 400
    assert response.json()["error"].startswith(f"{path} is not supported by this server")
    assert service.registry.get("pirate") is not None


async def test_version_is_one_that_clients_accept_and_is_there_at_once(state: ServerState) -> None:
    state.service, state.phase = None, Phase.LOADING
    async with connect(build_app(state)) as client:
        version = (await client.get("/api/version")).json()
        tags = await client.get("/api/tags")

    assert tuple(map(int, version["version"].split("."))) >= (0, 6, 4)  # what editors ask for
    assert version["motet"] == "1.2.3"
    assert tags.status_code == 503


@pytest.mark.parametrize("path", ["/", "/api/tags", "/api/version", "/api/ps"])
async def test_probes_may_use_head(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.head(path)).status_code == 200


async def test_the_root_says_what_clients_look_for(client: httpx.AsyncClient) -> None:
    assert (await client.get("/")).text == "Ollama is running"


async def test_what_ollama_has_and_this_server_has_not_is_404_in_its_shape(client: httpx.AsyncClient) -> None:
    response = await client.get("/api/status")

    assert response.status_code == 404
    assert set(response.json()) == {"error"}
