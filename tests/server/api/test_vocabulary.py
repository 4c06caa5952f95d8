"""Tokenizers that know more tokens than their model, as Gemma 3's does."""

from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.server.api.fake_service import FakeService


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "caf\u00e9"}, "prompt"),
        ("/v1/completions", {"prompt": [233]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\u00e9"}]}, "messages"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [233]}, "stop_token_ids"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"233": 1}}, "logit_bias"),
    ],
)
async def test_tokens_that_the_model_does_not_know_never_reach_it(
    client: httpx.AsyncClient, service: FakeService, path: str, body: dict[str, Any], param: str
) -> None:
    service.card = replace(service.card, vocab_size=200)

    refused = await client.post(path, json=body)
    answered = await client.post("/v1/completions", json={"prompt": "cafe"})

    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert answered.status_code == 200


async def test_lorax_refuses_them_with_its_own_status(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.card = replace(service.card, vocab_size=200)

    refused = await client.post("/generate", json={"inputs": "caf\u00e9"})

    assert refused.status_code == 422
    assert refused.json()["error_type"] == "validation"
