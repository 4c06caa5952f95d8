"""Adapters from a hub and from S3, through a whole server: asked for by their locations, like any other."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import botocore.session
import httpx
import pytest

from server.embedded.location import adapters_dir
from tests.adapters.fake_hub import SIGNATURE, FakeCdn, FakeHub, Repository
from tests.adapters.faulty_http import LIMIT_S, Fault
from tests.adapters.s3_server import running_s3
from tests.e2e.running import RunningServer

Launch = Callable[..., RunningServer]
NEEDED = ("adapter_config.json", "adapter_model.safetensors")
PIRATE = {name: (adapters_dir() / "pirate" / name).read_bytes() for name in NEEDED}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub(FakeCdn())
    server.repositories["org/pirate"] = Repository()
    server.repositories["org/pirate"].commit(PIRATE)
    with server.cdn.running(), server.running():
        yield server


def launch_with_hub(launch: Launch, hub: FakeHub, tmp_path: Path, *flags: str) -> RunningServer:
    cache = ("--adapter-cache-dir", str(tmp_path / "cache"))
    sources = ("--adapter-sources", "local,hub", *cache)
    return launch(*sources, *flags, environment=hub_environment(hub, tmp_path), nursery=None)


def hub_environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """Nothing of the machine's own may come in."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "token-of-server"}


def ask(server: RunningServer, model: str, **fields: object) -> httpx.Response:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 12,
        "temperature": 0,
        **fields,
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=LIMIT_S)


def words(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def test_an_adapter_of_the_hub_speaks_like_its_local_copy(
    launch: Launch, hub: FakeHub, tmp_path: Path
) -> None:
    server = launch_with_hub(launch, hub, tmp_path)

    fetched, local = ask(server, "org/pirate"), ask(server, "pirate")

    assert words(fetched) == words(local) != words(ask(server, "motet"))
    assert fetched.headers["x-adapter-id"] == "org/pirate"
    assert fetched.headers["x-adapter-source"] == "hub"
    missing = ask(server, "org/nobody")
    assert missing.status_code == 404
    assert "org/nobody" in missing.json()["error"]["message"]
    assert all("authorization" not in seen.headers for seen in hub.seen)


def test_every_request_is_asked_of_the_hub(launch: Launch, hub: FakeHub, tmp_path: Path) -> None:
    """What is in memory is not open to whom the hub does not show it any more."""
    server = launch_with_hub(launch, hub, tmp_path, "--adapter-hub-own-token")
    assert words(ask(server, "org/pirate"))
    hub.repositories["org/pirate"].readers = {"token-of-reader"}

    assert ask(server, "org/pirate").status_code == 404
    assert {seen.headers["authorization"] for seen in hub.seen} == {"Bearer token-of-server"}
    said = "\n".join(server.lines)
    assert SIGNATURE not in said
    assert "token-of-server" not in said


def test_each_requests_token_opens_what_it_shows_and_nothing_else(
    launch: Launch, hub: FakeHub, tmp_path: Path
) -> None:
    """On OpenAI's and on LoRAX's routes; whoever was served before opens nothing for others."""
    hub.repositories["org/pirate"].readers = {"token-of-reader"}
    server = launch_with_hub(launch, hub, tmp_path)

    def generate(token: str) -> httpx.Response:
        parameters = {"adapter_id": "org/pirate", "adapter_source": "hub", "api_token": token}
        body = {"inputs": "hi", "parameters": parameters | {"max_new_tokens": 4}}
        return httpx.post(f"{server.url}/generate", json=body, timeout=LIMIT_S)

    opened = ask(server, "org/pirate", adapter_source="hub", api_token="token-of-reader")
    assert words(opened) == words(ask(server, "pirate"))
    assert generate("token-of-reader").status_code == 200
    refused = [ask(server, "org/pirate", api_token="token-of-stranger"), ask(server, "org/pirate")]
    missing = ask(server, "org/nobody", api_token="token-of-reader")

    assert {answer.status_code for answer in (*refused, missing, generate("token-of-stranger"))} == {404}
    told = {answer.text.replace("pirate", "nobody") for answer in (*refused, missing)}
    assert len(told) == 1
    assert not [line for line in server.lines if "token-of" in line or SIGNATURE in line]


def test_a_download_does_not_hold_up_the_end_of_the_server(
    launch: Launch, hub: FakeHub, tmp_path: Path
) -> None:
    server = launch_with_hub(launch, hub, tmp_path, "--drain-timeout", "0")
    hub.cdn.faults = [Fault("/repos/", "drip", times=9)]
    asking = Thread(target=_until_gone, args=(server,))
    asking.start()
    assert hub.cdn.stalled.wait(LIMIT_S)

    assert server.stop() == 0
    asking.join()


def _until_gone(server: RunningServer) -> None:
    with suppress(httpx.HTTPError):
        ask(server, "org/pirate")


def test_an_adapter_in_s3_speaks_like_its_local_copy(launch: Launch, tmp_path: Path) -> None:
    with running_s3() as url:
        session = botocore.session.Session()
        session.set_credentials("AKIAOFTHETESTS", "secret-of-the-tests")
        client = session.create_client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="adapters")
        for name, content in PIRATE.items():
            client.put_object(Bucket="adapters", Key=f"open/pirate/{name}", Body=content)
        client.close()
        server = launch(
            *("--adapter-sources", "s3", "--adapter-s3-buckets", "adapters/open"),
            *("--adapter-cache-dir", str(tmp_path / "cache")),
            environment={
                "S3_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "AKIAOFTHETESTS",
                "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )

        fetched = ask(server, "s3://adapters/open/pirate")

        assert words(fetched) == words(ask(server, "pirate"))
        assert fetched.headers["x-adapter-source"] == "s3"
        assert ask(server, "s3://adapters/open/nobody").status_code == 404
        assert ask(server, "s3://adapters/closed/pirate").status_code == 400
        assert "AKIAOFTHETESTS" not in "\n".join(server.lines)
