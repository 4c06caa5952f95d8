"""The README's examples, copied out of it and run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.browsing import Site, browse
from tests.e2e.running import REPOSITORY, RunningServer

README = (REPOSITORY / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
    assert found
    return found


def commands() -> list[str]:
    """The curl lines, each with its continuation lines."""
    text = "\n".join(block for block in blocks("bash") if "curl" in block).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith("curl")]


@pytest.mark.parametrize("command", commands())
def test_curl_lines_work(server: RunningServer, command: str) -> None:
    done = subprocess.run(
        [
            "bash",
            "-c",
            command.replace(ADDRESS, server.url).replace("curl ", "curl -sS --fail-with-body ", 1),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stdout.replace('"error":null', "")
    assert len(done.stdout) > 50


def test_python_example_prints_five_voices(server: RunningServer) -> None:
    (example,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example.replace(ADDRESS, server.url)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    spoken = dict(re.findall(r"^(motet|pirate|json|haiku|german): (.+)$", done.stdout, re.M))
    assert len(set(spoken.values())) == 5


def test_browser_example_streams_from_another_origin(
    server: RunningServer, site: Site, tmp_path: Path
) -> None:
    """U4: the preflight passes and the headers can be read."""
    (example,) = blocks("js")

    report = browse(site, example.replace(ADDRESS, server.url), tmp_path)

    assert re.fullmatch(r"haiku \d+ ms to the first token", report["said"][0])  # type: ignore[index]
    assert len(str(report["shown"]).split()) > 5


def test_naive_browser_loop_works(server: RunningServer, site: Site, tmp_path: Path) -> None:
    """Z3: decodes each read on its own, splits at line ends, compares with [DONE]."""
    report = browse(
        site,
        """
        const messages = [{role: "user", content: "What is Motet?"}];
        const response = await fetch("ADDRESS/v1/chat/completions", {method: "POST",
          headers: {"Content-Type": "application/json", "Authorization": "Bearer x"},
          body: JSON.stringify({model: "german", stream: true, messages})});
        const reader = response.body.getReader(), decoder = new TextDecoder();
        while (true) {
          const {done, value} = await reader.read();
          if (done) break;
          for (const line of decoder.decode(value).split("\\n")) {
            if (!line.startsWith("data: ")) continue;
            const data = line.slice(6);
            if (data === "[DONE]") { console.log("done"); continue; }
            document.body.append(JSON.parse(data).choices[0].delta.content || "");
          }
        }""".replace("ADDRESS", server.url),
        tmp_path,
    )

    assert report["said"] == ["done"]
    assert report["shown"]
