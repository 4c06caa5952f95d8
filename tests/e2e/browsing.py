"""Real Chromium on the pages of a web site of its own, which is another origin to the server under test."""

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


@dataclass
class Site:
    """A web site of another origin, whose pages report what they did."""

    url: str
    pages: dict[str, str] = field(default_factory=dict)
    wishes: dict[str, Callable[[], None]] = field(default_factory=dict)  # what pages may POST for
    report: dict[str, object] = field(default_factory=dict)
    reported: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve_site() -> Iterator[Site]:
    """A site on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = there.pages.get(self.path, "").encode()
            self.send_response(200 if page else 404)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def do_POST(self) -> None:
            said = self.rfile.read(int(self.headers["content-length"]))
            if self.path in there.wishes:
                there.wishes[self.path]()
            else:
                there.report.update(json.loads(said))
                there.reported.set()
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there = Site(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield there
    finally:
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
