"""What `deploy/` says is true of this server: its metrics, its routes, and that nginx passes streams on."""

import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from benchmarks.nginx import nginx_running
from server.settings import Settings
from tests.e2e.running import REPOSITORY, RunningServer
from tests.server.api.conftest import CHAT, begin, make_state, manual, port, service, state
from tests.server.api.fake_service import FakeService, finish_of, token_event

__all__ = ["make_state", "manual", "port", "service", "state"]  # fixtures

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = "1.33"
_NAME = re.compile(r"\b((?:vllm:|motet_|process_)\w+)")


def promtool(*words: str, said: str | None = None) -> None:
    program = shutil.which("promtool")
    assert program is not None, "Debian's package: prometheus"
    done = subprocess.run(
        [program, *words], input=said, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


@pytest.fixture
def metrics(server: RunningServer) -> str:
    """After there was something to count."""
    body = {"model": "pirate", "prompt": "a", "max_tokens": 2}
    httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status()
    return httpx.get(f"{server.url}/metrics").text


def expressions() -> Iterator[str]:
    board = json.loads((DEPLOY / "grafana/dashboards/motet.json").read_text())
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for group in documents(DEPLOY / "alerts.yml")[0]["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def test_everything_that_is_drawn_or_watched_is_told(metrics: str) -> None:
    told = set(re.findall(r"^# TYPE (\S+) ", metrics, re.M))
    wanted = {name for expression in expressions() for name in _NAME.findall(expression)}
    assert len(wanted) > 20
    assert {re.sub(r"_bucket$", "", name) for name in wanted} <= told | {f"{name}_total" for name in told}


def test_labels_that_are_summed_by_are_there(metrics: str) -> None:
    for expression in expressions():
        names, by = _NAME.findall(expression), re.findall(r"by \(([\w, ]+)\)", expression)
        for label in {one.strip() for group in by for one in group.split(",")} - {"instance"}:
            families = [line for line in metrics.splitlines() if line.startswith(tuple(names))]
            if families:
                assert any(f'{label}="' in line for line in families), (label, expression)


def test_prometheus_takes_rules_configuration_and_metrics(metrics: str, tmp_path: Path) -> None:
    promtool("check", "rules", str(DEPLOY / "alerts.yml"))
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    shutil.copy(DEPLOY / "prometheus.yml", tmp_path)
    promtool("check", "config", "--syntax-only", str(tmp_path / "prometheus.yml"))


def test_kubernetes_takes_the_manifests() -> None:
    found = documents(DEPLOY / "kubernetes/motet.yaml")
    assert [one["kind"] for one in found] == [
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
    ]
    for one in found:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_probes_and_variables_are_those_of_the_server(server: RunningServer) -> None:
    (deployment,) = (d for d in documents(DEPLOY / "kubernetes/motet.yaml") if d["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["motet"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert httpx.get(server.url + container[probe]["httpGet"]["path"]).status_code == 200
    named = {*(one["name"] for one in container["env"]), *compose["environment"]}
    named |= set(re.findall(r"MOTET_[A-Z_]+(?==)", (DEPLOY / "motet.service").read_text()))
    known = {f"MOTET_{name.upper()}" for name in Settings.model_fields}
    assert named <= known
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    drain = next(float(one["value"]) for one in container["env"] if one["name"] == "MOTET_DRAIN_TIMEOUT")
    assert grace > drain


def test_compose_mounts_what_is_there() -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    for one in services.values():
        for volume in one.get("volumes", ()):
            source = volume.split(":")[0]
            if not source.startswith("$"):
                assert (DEPLOY / source).exists(), volume


@pytest.fixture
async def front(port: int) -> AsyncIterator[int]:
    """nginx with the configuration of `deploy/`, but for the addresses."""
    text = (DEPLOY / "nginx.conf").read_text().replace("server motet:8000;", f"server 127.0.0.1:{port};")
    with nginx_running(lambda own: text.replace("listen 80;", f"listen 127.0.0.1:{own};")) as through:
        yield through


async def test_tokens_come_one_by_one_through_nginx(front: int, manual: FakeService) -> None:
    """Each is read before the next one exists."""
    connection, stream = await begin(front, manual, CHAT)
    stream.put(token_event("One"))
    assert (await connection.read_head()).status == 200
    assert b'"content":"One"' in await connection.read_chunk()
    stream.put(token_event(" two"))
    assert b'"content":" two"' in await connection.read_chunk()
    stream.put(token_event("!", finish=finish_of(stream.request, "One two!", 3)))
    rest = b""
    while chunk := await connection.read_chunk():
        rest += chunk
    assert rest.endswith(b"data: [DONE]\n\n")
    connection.drop()
