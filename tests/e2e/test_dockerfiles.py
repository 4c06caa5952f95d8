"""Each line of the Dockerfiles, carried out in roots with nothing installed; what comes out serves."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.e2e.dockerfiles import Image, build, stages_of
from tests.e2e.running import REPOSITORY, RunningServer

DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_everything_that_is_copied_is_there(name: str) -> None:
    stages = stages_of((REPOSITORY / name).read_text())
    known = {stage.name for stage in stages}
    copied = [rest.split() for stage in stages for instruction, rest in stage.lines if instruction == "COPY"]
    assert copied
    for words in copied:
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in known
        else:
            assert all((REPOSITORY / word).exists() for word in words[:-1])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serve(image: Image) -> None:
    """As the image's entry point does, with its user; and asked as its health check asks."""
    port = free_port()
    image.environment |= {"MOTET_PORT": str(port), "MOTET_HOST": "127.0.0.1", "HOME": image.folder}
    process = subprocess.Popen(
        image.argv(image.entrypoint),
        env=image.environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    running = RunningServer(process)
    try:
        running.wait_for(r"^motet ready")
        image.run(image.check)
        body = {"model": "pirate", "messages": [{"role": "user", "content": "What is an adapter?"}]}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        running.kill()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("debootstrap") is None, reason="needs root and debootstrap"
)
@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_line_works_on_a_bare_machine_and_the_image_serves(name: str, tmp_path: Path) -> None:
    image = build(REPOSITORY / name, REPOSITORY, tmp_path)

    assert image.user == "motet"
    serve(image)
