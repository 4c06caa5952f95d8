"""Who is charged, and hard limits: what options and keys say, and what each protocol answers."""

import argparse
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.api.caller import Caller
from server.api.keys import KeysError, parse_keys
from server.api.shares import FairBy, Limits, ShareOptions, share_of
from server.api.state import ApiOptions
from server.engine.sequence import Sequence
from server.settings import Settings, SettingsError, read_settings
from tests.server.api.raw_http import Connection, RawAnswer, ask, post, until
from tests.server.api.test_access import (
    PROTOCOLS,
    Protocol,
    count_tokens,
    message,
    ollama_load,
    ollama_pull,
)
from tests.server.api.test_real_service import CARD, ENDLESS, house

ALICE = Caller("alice", "digest-a")
GENERATING = [each for each in PROTOCOLS if each not in (count_tokens, ollama_load, ollama_pull)]


# -- tenants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "adapters", "tenant"),
    [
        ("adapter", ("pirate",), "pirate"),
        ("adapter", (), ""),
        ("adapter", ("b", "a", "c"), "a"),
        ("key", ("pirate",), "digest-a"),
        ("key", (), "digest-a"),
        ("off", ("pirate",), ""),
    ],
)
def test_who_is_charged_is_what_shares_go_by(by: FairBy, adapters: tuple[str, ...], tenant: str) -> None:
    assert share_of(ALICE, adapters, CARD, ShareOptions(by)).tenant == tenant


def test_weights_are_by_name_of_the_adapter_the_model_or_the_key() -> None:
    weights = {"pirate": 2.0, "base": 3.0, "alice": 4.0}
    by_adapter, by_key = ShareOptions("adapter", weights), ShareOptions("key", weights)
    assert share_of(ALICE, ("pirate",), CARD, by_adapter).weight == 2.0
    assert share_of(ALICE, ("other",), CARD, by_adapter).weight == 1.0
    assert share_of(ALICE, (), CARD, by_adapter).weight == 3.0
    assert share_of(ALICE, ("pirate",), CARD, by_key).weight == 4.0
    assert share_of(replace(ALICE, weight=0.5), (), CARD, by_key).weight == 0.5
    assert share_of(ALICE, ("pirate",), CARD, ShareOptions("off", weights)).weight == 1.0


def test_limits_of_a_key_come_from_the_file_and_else_from_the_options() -> None:
    options = ShareOptions(of_key=Limits(8, 100))
    [quota] = share_of(replace(ALICE, max_requests=2), (), CARD, options).quotas
    assert (quota.subject, quota.max_requests, quota.tokens_per_minute) == ("digest-a", 2, 100)


def test_every_adapter_of_a_request_has_its_limit_and_the_base_model_has_none() -> None:
    options = ShareOptions(of_adapter=Limits(max_requests=1))
    quotas = share_of(ALICE, ("a", "b", "a"), CARD, options).quotas
    assert [quota.subject for quota in quotas] == ["a", "b"]
    assert share_of(ALICE, (), CARD, options).quotas == ()
    assert share_of(ALICE, ("a",), CARD, ShareOptions()).quotas == ()


def test_the_file_of_keys_says_weights_and_limits() -> None:
    [key] = parse_keys("sk-1 weight=2.5 requests=8 tokens-per-minute=60000\n")
    caller = key.caller
    assert (caller.weight, caller.max_requests, caller.tokens_per_minute) == (2.5, 8, 60000)


@pytest.mark.parametrize(
    "option",
    [
        *("weight=", "weight=0", "weight=-1", "weight=nan", "weight=inf", "weight=1e9"),
        *("requests=0", "requests=x", "tokens-per-minute=1.5", "tokens-per-minute=", "tokens-per-minute=-5"),
    ],
)
def test_weights_and_limits_that_are_none_are_refused(option: str) -> None:
    with pytest.raises(KeysError, match=f"line 1: {option.partition('=')[0]}= takes"):
        parse_keys(f"sk-secret {option}\n")


@pytest.mark.parametrize("word", ["pirate", "pirate=", "=2", "pirate=0", "pirate=-1", "pirate=nan"])
def test_weights_on_the_command_line_are_checked(word: str) -> None:
    with pytest.raises(SettingsError, match="--fair-weights"):
        read_settings(argparse.Namespace(fair_weights=[word]))


def test_weights_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTET_FAIR_WEIGHTS", "pirate=2, team/a=0.5")
    assert Settings().weights() == {"pirate": 2.0, "team/a": 0.5}


# -- over HTTP -----------------------------------------------------------------------------------------


def assert_refused_in_its_own_shape(path: str, answer: RawAnswer) -> None:
    assert answer.status == 429
    assert int(answer.header("retry-after") or 0) >= 1
    body = json.loads(answer.body)
    if path == message(None)[0]:
        assert body["error"]["type"] == "rate_limit_error"
    elif path.startswith("/v1/"):
        assert (body["error"]["type"], body["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    elif path.startswith("/api/jobs"):
        assert "under way" in body["detail"]
    elif path.startswith(("/api/", "/v2/")):
        assert "under way" in body["error"]
    else:
        assert body == {"error": "Model is overloaded", "error_type": "overloaded"}


def endless(model: str, key: str | None = None) -> bytes:
    headers = () if key is None else (f"Authorization: Bearer {key}",)
    body: dict[str, Any] = {"prompt": "Hi", "model": model, "max_tokens": ENDLESS, "ignore_eos": True}
    return post("/v1/completions", {**body, "stream": True}, *headers)


@pytest.mark.parametrize("protocol", GENERATING)
async def test_one_request_too_many_with_an_adapter_is_refused_in_every_protocol(protocol: Protocol) -> None:
    may_compute = threading.Event()
    options = ApiOptions(shares=ShareOptions(of_adapter=Limits(max_requests=1)))
    async with house(options=options, interrupt=lambda point: may_compute.wait(30)) as h:
        try:
            first = await Connection.open(h.port)
            await first.send(endless("a"))
            await until(lambda: len(h.service._live) == 1)
            path, body = protocol("a")
            assert_refused_in_its_own_shape(path, await ask(h.port, post(path, body)))
        finally:
            may_compute.set()
        first.drop()
        await h.everything_is_free()
        assert (await ask(h.port, post(path, body))).status == 200
        await h.everything_is_free()


async def test_limits_of_one_key_are_not_anothers(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-few requests=1\nsk-many\n")
    may_compute = threading.Event()
    options = ApiOptions(api_keys_file=tmp_path / "keys")
    async with house(options=options, interrupt=lambda point: may_compute.wait(30)) as h:
        try:
            connections = []
            for key in ("sk-few", "sk-many", "sk-many"):
                connections.append(await Connection.open(h.port))
                await connections[-1].send(endless("a", key))
            await until(lambda: len(h.service._live) == 3)
            refused = await ask(h.port, endless("b", "sk-few"))
            assert refused.status == 429
            assert "this API key" in json.loads(refused.body)["error"]["message"]
        finally:
            may_compute.set()
        for connection in connections:
            connection.drop()
        await h.everything_is_free()


async def test_tokens_of_a_minute_are_used_up_by_answers_too() -> None:
    options = ApiOptions(shares=ShareOptions(of_key=Limits(tokens_per_minute=20)))
    async with house(options=options) as h:
        body = {"prompt": "Hi", "max_tokens": 30, "ignore_eos": True}
        answers = [await ask(h.port, post("/v1/completions", body)) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 429]
        assert 1 <= int(answers[1].header("retry-after") or 0) <= 60
        await h.everything_is_free()


@pytest.mark.parametrize(
    ("by", "charged"),
    [
        ("adapter", [("", 1.0), ("a", 2.0)]),
        ("key", [("digest of alice", 4.0), ("digest of bob", 1.0)]),
        ("off", [("", 1.0)]),
    ],
)
async def test_sequences_reach_the_engine_with_their_tenant_and_its_weight(
    by: FairBy, charged: list[tuple[str, float]], tmp_path: Path
) -> None:
    keys = "sk-alice name=alice\nsk-bob name=bob\n"
    (tmp_path / "keys").write_text(keys)
    owners = {key.caller.digest: f"digest of {key.caller.name}" for key in parse_keys(keys)}
    seen: set[tuple[str, float]] = set()

    def note_and_choose(sequence: Sequence) -> int:
        seen.add((owners.get(sequence.tenant, sequence.tenant), sequence.weight))
        return 5

    shares = ShareOptions(by, {"a": 2.0, "alice": 4.0})
    options = ApiOptions(shares=shares, api_keys_file=tmp_path / "keys")
    async with house(options=options, choose=note_and_choose) as h:
        for key, model in (("sk-alice", "base"), ("sk-bob", "a")):
            body = {"inputs": "Hi", "parameters": {"adapter_id": model}}
            answer = await ask(h.port, post("/generate", body, f"Authorization: Bearer {key}"))
            assert answer.status == 200
        await h.everything_is_free()
    assert sorted(seen) == charged
