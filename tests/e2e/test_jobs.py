"""Jobs over a real server: EventSource in real Chromium on a page of another origin, and what a wizard needs.

Rows J1, J7 to J12, J14, U4 on this route.
"""

import json
import re
import socket
import socketserver
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest
import torch

from benchmarks.make_model import write_model
from benchmarks.shapes import SHAPES
from tests.e2e.browsing import Site, browse
from tests.e2e.running import RunningServer

Launch = Callable[..., RunningServer]

QUESTION = {"prompt": "What is a prefix cache?", "temperature": 0, "max_new_tokens": 40}
REQUESTS = "vllm:request_success_total"

LISTEN = """
const url = new URL("ADDRESS/api/jobs/pirate/infer/stream");
const fields = QUESTION;
for (const name of Object.keys(fields)) url.searchParams.set(name, fields[name]);
const source = new EventSource(url);
const data = [], ids = [];
let opened = 0, dropped = 0;
source.onopen = () => { opened += 1; };
source.onmessage = (event) => {
  data.push(event.data);
  ids.push(event.lastEventId);
  if (data.length === CUT_AFTER) fetch("/cut", {method: "POST"});
};
await new Promise((resolve) => {
  source.onerror = () => {
    if (source.readyState === EventSource.CLOSED) resolve();
    else dropped += 1;
  };
});
console.log(JSON.stringify({data, ids, opened, dropped}));
"""


def listen(
    site: Site, profile: Path, address: str, *, cut_after: int = 0, **fields: object
) -> dict[str, list[str] | int]:
    """What an EventSource that nobody closes gets, until the browser gives up by itself."""
    script = LISTEN.replace("ADDRESS", address).replace("CUT_AFTER", str(cut_after))
    report = browse(site, script.replace("QUESTION", json.dumps({**QUESTION, **fields})), profile)
    [said] = report["said"]  # type: ignore[misc]
    return dict(json.loads(said))


def answer_of(server: RunningServer) -> str:
    """The blocking one to the question."""
    answer = httpx.post(f"{server.url}/api/jobs/pirate/infer", json=QUESTION, timeout=60)
    assert answer.status_code == 200
    return str(answer.json()["response"])


def text_of(heard: dict[str, list[str] | int]) -> str:
    *tokens, done = heard["data"]  # type: ignore[misc]
    assert done == "[DONE]"
    return "".join(json.loads(token)["token"] for token in tokens)


def are_in_order(ids: list[str] | int) -> bool:
    """From 1, without a gap or a repetition, all of one generation."""
    assert isinstance(ids, list)
    generation = ids[0].partition(":")[0]
    return ids == [f"{generation}:{number}" for number in range(1, len(ids) + 1)]


def test_J8_browser_stops_by_itself_after_the_end_and_the_model_runs_once(
    server: RunningServer, site: Site, tmp_path: Path
) -> None:
    """The page does not close its EventSource: the browser comes back, and is told 204."""
    expected = answer_of(server)
    before = server.metric(REQUESTS)
    heard = listen(site, tmp_path, server.url)

    assert text_of(heard) == expected
    assert are_in_order(heard["ids"])
    assert (heard["opened"], heard["dropped"]) == (1, 1)
    server.wait_until_idle()
    assert server.metric(REQUESTS) - before == 1


class Link:
    """A way to the server for TCP connections. The first one to carry three events carries no more, and
    breaks when it is cut.
    """

    NUM_EVENTS = 3

    def __init__(self, url: str) -> None:
        there = urlsplit(url)
        self._server = (there.hostname or "", there.port or 0)
        self._cut = threading.Event()
        self._has_held = threading.Lock()
        link = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                link._carry(self.request)

        self._listener = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._listener.daemon_threads = True
        self._thread = threading.Thread(target=self._listener.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"

    def cut(self) -> None:
        self._cut.set()

    def close(self) -> None:
        self._cut.set()
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()

    def _carry(self, browser: socket.socket) -> None:
        with socket.create_connection(self._server) as server:
            up = threading.Thread(target=_pump, args=(browser, server), daemon=True)
            up.start()
            num_events = 0
            while received := server.recv(1 << 16):
                for event in received.splitlines(keepends=True):
                    browser.sendall(event)
                    num_events += event == b"\n"
                    if num_events == self.NUM_EVENTS and self._has_held.acquire(blocking=False):
                        assert self._cut.wait(60)
                        browser.shutdown(socket.SHUT_RD)  # wakes the other thread, which keeps it open
                        up.join()
                        _break(browser)
                        return


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while received := source.recv(1 << 16):
            target.sendall(received)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # broken


def _break(connection: socket.socket) -> None:
    """As a dying router does: a reset, no farewell."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextmanager
def link_to(server: RunningServer) -> Iterator[Link]:
    link = Link(server.url)
    try:
        yield link
    finally:
        link.close()


def test_J9_browser_goes_on_where_its_link_dropped(server: RunningServer, site: Site, tmp_path: Path) -> None:
    """It waits `retry` milliseconds and names the event that it saw last, without any code of the page's."""
    expected = answer_of(server)
    before = server.metric(REQUESTS)
    with link_to(server) as link:
        site.wishes["/cut"] = link.cut
        heard = listen(site, tmp_path, link.url, cut_after=Link.NUM_EVENTS)

    assert text_of(heard) == expected
    assert are_in_order(heard["ids"])
    assert (heard["opened"], heard["dropped"]) == (2, 2)
    server.wait_until_idle()
    assert server.metric(REQUESTS) - before == 1


def test_J11_browser_brings_its_key_in_the_query(launch: Launch, site: Site, tmp_path: Path) -> None:
    server = launch("--api-key", "secret")
    wrong = listen(site, tmp_path / "wrong", server.url, api_key="guess")
    site.reported.clear()
    right = listen(site, tmp_path / "right", server.url, api_key="secret")

    assert wrong == {"data": [], "ids": [], "opened": 0, "dropped": 0}
    assert text_of(right)
    assert are_in_order(right["ids"])
    assert not any("secret" in line for line in server.lines)


def test_U4_fetch_reads_headers_of_the_stream_from_another_origin(
    server: RunningServer, site: Site, tmp_path: Path
) -> None:
    """And names the last event in a header of its own, as polyfills of EventSource do: with a preflight."""
    script = """
    const ask = (headers) => fetch("ADDRESS/api/jobs/pirate/infer/stream", {method: "POST",
      headers: {"Content-Type": "application/json", ...headers}, body: JSON.stringify(QUESTION)});
    const response = await ask({});
    const names = ["x-adapter-id", "x-prompt-tokens", "x-compute-time", "x-request-id"];
    const text = await response.text();
    const ids = [...text.matchAll(/^id: (.*)$/gm)].map((match) => match[1]);
    const rest = await ask({"Last-Event-ID": ids.at(-2)});
    const none = await ask({"Last-Event-ID": ids.at(-1)});
    console.log(JSON.stringify({headers: names.map((name) => response.headers.get(name)),
      rest: await rest.text(), last: ids.at(-1), none: none.status}));
    """
    script = script.replace("ADDRESS", server.url).replace("QUESTION", json.dumps(QUESTION))
    [said] = browse(site, script, tmp_path)["said"]  # type: ignore[misc]
    heard = json.loads(said)

    assert heard["headers"][0] == "pirate"
    assert all(heard["headers"])
    assert heard["rest"] == f"id: {heard['last']}\ndata: [DONE]\n\n"
    assert heard["none"] == 204


def test_J1_stream_says_the_blocking_answer_and_J14_the_event_loop_stays_free(server: RunningServer) -> None:
    """C1: health is asked for again and again while the stream runs: 50 ms, beside what it takes when nothing
    runs, as the machine may have other work.
    """
    query: dict[str, str | float] = {"prompt": "Tell me everything", "seed": 4, "temperature": 2.0}
    tokens: list[str] = []
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def health_s() -> float:
            asked = time.monotonic()
            assert client.get("/health").status_code == 200
            return time.monotonic() - asked

        alone = [health_s() for _ in range(11)]
        beside = []
        with client.stream("GET", "/api/jobs/haiku/infer/stream", params=query) as stream:
            for line in stream.iter_lines():
                if not line.startswith("data: {"):
                    continue
                tokens.append(json.loads(line[6:])["token"])
                if len(tokens) % 3 == 0:
                    beside.append(health_s())
        whole = client.post("/api/jobs/haiku/infer", json=query)

    assert "".join(tokens) == whole.json()["response"]
    assert len(beside) > 10
    assert statistics.median(beside) < 0.05 + statistics.median(alone)


LONG: dict[str, str | float] = {"prompt": "la la la la", "temperature": 0, "max_new_tokens": 2048}
"""The adapter `json` goes round in a circle after it: it never ends by itself."""


def drop_after_one(server: RunningServer) -> str:
    """Begin a long answer and go away after its first event, whose id this is."""
    with httpx.stream("GET", f"{server.url}/api/jobs/json/infer/stream", params=LONG, timeout=60) as stream:
        return next(line for line in stream.iter_lines() if line.startswith("id: ")).removeprefix("id: ")


def test_without_a_resume_window_a_dropped_stream_ends_at_once(launch: Launch) -> None:
    server = launch("--resume-window", "0")
    seen = drop_after_one(server)
    server.wait_until_idle()
    path, headers = "/api/jobs/json/infer/stream", {"Last-Event-ID": seen}
    again = httpx.get(f"{server.url}{path}", params=LONG, headers=headers, timeout=60)
    metrics = httpx.get(f"{server.url}/metrics", timeout=60).text

    assert again.status_code == 204
    assert server.metric(REQUESTS) == 1
    assert re.search(rf'^{REQUESTS}{{.*finished_reason="abort".*}} 1\.0$', metrics, re.M), metrics


def test_dropped_stream_does_not_keep_the_server_from_going_down(launch: Launch) -> None:
    server = launch("--resume-window", "600", "--drain-timeout", "0.5")
    drop_after_one(server)

    assert server.stop() == 0


def test_J12_long_prompts_are_posted(launch: Launch, tmp_path: Path) -> None:
    """T11: 8192 characters of Chinese are 73 kB of URL, and 24,576 tokens of a tokenizer that has none of
    them. Z13: the model goes by the name of its folder, and by the whole path.
    """
    shape = replace(SHAPES["tiny"], max_position=32_768)
    folder = tmp_path / "tiny"
    write_model(shape, folder, seed=0, device=torch.device("cpu"), characters=100_000)
    server = launch(str(folder), "--dtype", "float32")
    prompt = "\u732b" * 8192
    path = f"{server.url}/api/jobs/tiny/infer/stream"
    posted = httpx.post(path, json={"prompt": prompt, "max_new_tokens": 3, "temperature": 0}, timeout=100)

    assert posted.status_code == 200
    assert posted.headers["x-prompt-tokens"] == "24576"
    assert posted.text.endswith("data: [DONE]\n\n")
    assert httpx.post(path, json={"prompt": prompt + "\u732b"}, timeout=60).status_code == 422
    assert _get(server, f"/api/jobs/tiny/infer/stream?prompt={quote(prompt)}") == b"HTTP/1.1 400 Bad Request"
    short = {"model": str(folder), "prompt": "x", "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=short, timeout=60).json()["model"] == str(folder)


def _get(server: RunningServer, path: str) -> bytes:
    """The status line that answers a path of any length (httpx would not even send it)."""
    there = urlsplit(server.url)
    with socket.create_connection((there.hostname or "", there.port or 0), timeout=60) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode("ascii"))
        return connection.recv(1 << 16).partition(b"\r\n")[0]


def test_J5_job_that_is_not_complete_is_400_and_one_that_does_not_exist_404(
    launch: Launch, tmp_path: Path
) -> None:
    """A folder of jobs: training makes the folder first and the adapter last."""
    (tmp_path / "job-1").mkdir()
    (tmp_path / "job-1" / "adapter_config.json").write_text("{}")
    server = launch("--adapters-dir", str(tmp_path))
    answers = [
        httpx.post(f"{server.url}/api/jobs/{job}/infer", json={"prompt": "x"}, timeout=60)
        for job in ("job-1", "job-2")
    ]

    assert [answer.status_code for answer in answers] == [400, 404]
    assert all(isinstance(answer.json()["detail"], str) for answer in answers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_J13_both_devices_say_the_same(launch: Launch) -> None:
    texts = []
    for device in ("cpu", "cuda"):
        server = launch("--device", device, "--dtype", "float32")
        texts.append(answer_of(server))
        server.stop()
    assert texts[0] == texts[1]
