"""The README's examples, copied out of it and run as they stand."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.e2e.running import REPOSITORY, RunningServer

README = (REPOSITORY / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
CHROMIUM = (
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


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
    assert "error" not in done.stdout
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


@dataclass
class Site:
    """A web site of another origin, whose pages report what they did."""

    url: str
    pages: dict[str, str] = field(default_factory=dict)
    report: dict[str, object] = field(default_factory=dict)
    reported: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def site() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = there.pages.get(self.path, "").encode()
            self.send_response(200 if page else 404)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def do_POST(self) -> None:
            there.report.update(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()
            there.reported.set()

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there = Site(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield there
    http.shutdown()
    thread.join()
    http.server_close()


def browse(site: Site, script: str, profile: Path) -> dict[str, object]:
    """Run a module script in real Chromium on a page of the site; what it logs and shows comes back."""
    site.pages["/"] = f"""<!doctype html><meta charset="utf-8"><body></body><script type="module">
const said = [];
console.log = (...words) => said.push(words.join(" "));
const report = (error) => fetch("/report", {{method: "POST", body: JSON.stringify(
  {{said, shown: document.body.textContent, error: error ? String(error) : null}})}});
try {{
{script}
await report();
}} catch (error) {{ await report(error); }}
</script>"""
    browser = subprocess.Popen(
        [*CHROMIUM, f"--user-data-dir={profile}", "--remote-debugging-port=0", f"{site.url}/"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert site.reported.wait(60), "the page never reported back"
    finally:
        browser.kill()
        browser.wait(10)
    assert site.report["error"] is None
    return site.report


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
