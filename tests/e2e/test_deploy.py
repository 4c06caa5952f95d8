"""What `deploy/` says is true of this server: metrics, probes, variables. nginx is in test_nginx.py."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from server.settings import Settings
from tests.e2e.running import REPOSITORY, RunningServer

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = "1.33"
_NAME = re.compile(r"\b((?:vllm:|motet_|process_)\w+)")


def promtool(*words: str, said: str | None = None, status: int = 0) -> str:
    """What it complains about."""
    program = shutil.which("promtool")
    assert program is not None, "Debian's package: prometheus"
    done = subprocess.run(
        [program, *words], input=said, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


@pytest.fixture
def metrics(server: RunningServer) -> str:
    """After there was something to count, and while something runs."""
    url, body = f"{server.url}/v1/completions", {"model": "pirate", "prompt": "a", "ignore_eos": True}
    httpx.post(url, json=body | {"max_tokens": 2}, timeout=60).raise_for_status()
    with httpx.stream("POST", url, json=body | {"max_tokens": 2000, "stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()  # dropped, it would end the answer
        next(lines)
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
            assert any(f'{label}="' in line for line in families), (label, expression)


def test_prometheus_complains_of_no_name_but_those_that_are_vllms(metrics: str) -> None:
    complaints = promtool("check", "metrics", said=metrics, status=3).splitlines()
    assert [line for line in complaints if not line.startswith("vllm:")] == []


def test_prometheus_takes_rules_and_configuration(tmp_path: Path) -> None:
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


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd here")
    unit = (DEPLOY / "motet.service").read_text()
    started = re.search(r"^ExecStart=(\S+) serve$", unit, re.M)
    assert started is not None
    (tmp_path / "motet.service").write_text(unit.replace(started[1], shutil.which("true") or "/bin/true"))
    words = [program, "verify", "--man=no", str(tmp_path / "motet.service")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert "motet.service" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


def test_compose_mounts_what_is_there() -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    for one in services.values():
        for volume in one.get("volumes", ()):
            source = volume.split(":")[0]
            if not source.startswith("$"):
                assert (DEPLOY / source).exists(), volume
