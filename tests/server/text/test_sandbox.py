"""A sandbox answers, or ends what takes too much; and the next job gets a new one."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from io import BytesIO

import pytest

from server.text.sandbox import (
    Sandbox,
    SandboxOverrun,
    SandboxUnavailable,
    line_of,
    read_frame,
    write_frame,
)

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MakeSandbox = Callable[..., Sandbox]


@pytest.fixture
def make_sandbox() -> Iterator[MakeSandbox]:
    made: list[Sandbox] = []

    def make(*, memory_bytes: int = 512 * 2**20, cpu_s: float = 2.0) -> Sandbox:
        made.append(Sandbox("templates", memory_bytes=memory_bytes, cpu_s=cpu_s))
        return made[-1]

    yield make
    for sandbox in made:
        sandbox.close()


def render(sandbox: Sandbox, template: str, **variables: object) -> str | None:
    """The text, or None and the reason in `refusal`."""
    job = {"messages": [{"role": "user", "content": "hi"}], "options": {}, "variables": variables}
    answer, texts = sandbox.ask(job, template.encode())
    return texts[0].decode() if texts else f"refused: {answer['refused']}"


def pid(sandbox: Sandbox) -> int:
    assert sandbox._process is not None
    return sandbox._process.pid


def test_jobs_are_answered_one_after_the_other_by_one_process(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox()
    assert render(sandbox, "{{ messages[0].content }} {{ name }}", name="日本") == "hi 日本"
    first = pid(sandbox)
    assert render(sandbox, "{% if %}").startswith("refused: ")
    assert render(sandbox, "again") == "again"
    assert pid(sandbox) == first


def test_many_threads_may_ask_at_once(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox()
    answers: dict[int, str | None] = {}

    def ask(number: int) -> None:
        answers[number] = render(sandbox, "{{ number }}", number=number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) for number in range(16)}


def test_a_loop_without_end_costs_its_process_and_nothing_else(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(cpu_s=0.2)
    render(sandbox, "warm")
    first = pid(sandbox)
    with pytest.raises(SandboxOverrun, match=r"more than 0\.2 seconds"):
        render(sandbox, LOOP)
    assert render(sandbox, "again") == "again"
    assert pid(sandbox) != first


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content * 10**9 }}",
        "{% set x = namespace(s='x') %}{% for i in range(40) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ range(99999) | list * 10**6 }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_what_takes_too_much_memory_is_refused(make_sandbox: MakeSandbox, template: str) -> None:
    sandbox = make_sandbox(memory_bytes=400 * 2**20)
    answer = render(sandbox, template)
    assert answer in ("refused: it needs too much memory", "refused: it makes more than 16777216 characters")
    assert render(sandbox, "again") == "again"


def test_a_process_that_was_killed_is_replaced(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox()
    render(sandbox, "warm")
    process = sandbox._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert render(sandbox, "again") == "again"


def test_the_process_has_no_secrets_and_may_write_nothing(
    make_sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTET_API_KEY", "sk-secret")
    sandbox = make_sandbox()
    render(sandbox, "warm")
    with open(f"/proc/{pid(sandbox)}/environ", "rb") as environment:
        assert b"sk-secret" not in environment.read()
    with open(f"/proc/{pid(sandbox)}/limits") as limits:
        [size] = [line for line in limits if line.startswith("Max file size")]
    assert size.split()[3:5] == ["0", "0"]


def test_closing_ends_a_job_that_runs(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(cpu_s=1000.0)
    render(sandbox, "warm")
    failed: list[Exception] = []

    def ask() -> None:
        try:
            render(sandbox, LOOP)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not sandbox._lock.locked():
        pass
    sandbox.close()
    thread.join(30)
    assert [type(error) for error in failed] == [SandboxUnavailable]
    with pytest.raises(SandboxUnavailable, match="shutting down"):
        render(sandbox, "again")


def test_frames_carry_what_was_put_in() -> None:
    blobs = [b"", b"line\nline", bytes(range(256))]
    file = BytesIO()
    write_frame(file, line_of({"text": "日\ud800\n"}, blobs), blobs)
    file.seek(0)
    assert read_frame(file) == ({"text": "日\ud800\n"}, blobs)
    with pytest.raises(EOFError):
        read_frame(file)


@pytest.mark.parametrize("raw", [b"", b'{"blobs": [5]}\nabc', b'{"blobs": []}', b'{"blobs": [], "a"'])
def test_a_frame_that_breaks_off_is_no_frame(raw: bytes) -> None:
    with pytest.raises(EOFError):
        read_frame(BytesIO(raw))


def test_no_child_is_born_while_it_is_closed(
    make_sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one was ended by `close` while a job was about to use it."""
    sandbox = make_sandbox(cpu_s=1000.0)
    born: list[subprocess.Popen[bytes]] = []
    start = sandbox._start

    def start_and_be_closed() -> subprocess.Popen[bytes]:
        born.append(start())
        sandbox._is_closed = True  # the first thing that `close` does, in another thread
        return born[-1]

    monkeypatch.setattr(sandbox, "_start", start_and_be_closed)
    with pytest.raises(SandboxUnavailable, match="shutting down"):
        render(sandbox, LOOP)
    assert born[0].wait(30) is not None
    sandbox.close()
