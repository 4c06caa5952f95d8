"""The log tells what happened, in one line each, and nothing that a client said."""

import io
import logging
from collections.abc import Iterator

import pytest

from server.log import OneLineFormatter, configure_logging, log_request, without_text
from server.metrics import RequestStats
from server.types import FinishReason, Timing

SECRET = "the patient's name is Smith"


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    """The log, with the set-up taken back afterwards."""
    root = logging.getLogger()
    names = ["motet", "server", "adapters"]
    levels = {name: logging.getLogger(name).level for name in names}
    level, handlers = root.level, list(root.handlers)
    out = io.StringIO()
    configure_logging("info", out)
    yield out
    root.handlers, root.level = handlers, level
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


def test_a_request_is_one_line_of_ids_counts_and_times(out: io.StringIO) -> None:
    timing = Timing(received=0.0, queued=0.1, started=0.3, first_token=0.5, last_token=0.9)
    log_request(RequestStats("req-1", "pirate", FinishReason.STOP, 1, 16, 7, 2, 5, timing))
    [line] = out.getvalue().splitlines()
    assert line.endswith(
        "request req-1 adapter=pirate finish=stop n=1 prompt=7 cached=2 generated=5"
        " queue=200ms first=500ms total=900ms"
    )


def test_the_message_of_an_exception_is_left_out(out: io.StringIO) -> None:
    def parse(text: str) -> int:
        return int(text)

    try:
        try:
            parse(SECRET)
        except ValueError as error:
            raise RuntimeError(f"cannot parse {SECRET}") from error
    except RuntimeError:
        logging.getLogger("server.engine").exception("step failed")
    [line] = out.getvalue().splitlines()
    assert "Smith" not in line
    assert "step failed: RuntimeError (test_log.py:" in line
    assert "from ValueError (test_log.py:" in line


def test_an_exception_that_was_never_raised_is_its_type() -> None:
    assert without_text(KeyError(SECRET)) == "KeyError"


def test_access_lines_lose_their_query_string(out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    access = logging.getLogger("uvicorn.access")
    for logger in (access, logging.getLogger("uvicorn")):  # other tests' servers have set them up their way
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger, "handlers", [])
    access.setLevel(logging.INFO)
    access.info(
        '%s - "%s %s HTTP/%s" %d',
        "127.0.0.1:1",
        "GET",
        f"/api/jobs/a/infer/stream?prompt={SECRET}",
        "1.1",
        200,
    )
    line = out.getvalue()
    assert "GET /api/jobs/a/infer/stream?***" in line
    assert "prompt=" not in line


@pytest.mark.parametrize(
    "message",
    [
        "GET /x?a=1&api_key=sk-123&b=2",
        "Authorization: Bearer sk-123",
        'headers {"x-api-key": "sk-123"}',
        "api_token=sk-123",
        "API-KEY: sk-123",
    ],
)
def test_keys_are_not_written(out: io.StringIO, message: str) -> None:
    logging.getLogger("somebody.elses").warning(message)
    assert "sk-123" not in out.getvalue()
    assert "***" in out.getvalue()


def test_a_record_is_always_one_line(out: io.StringIO) -> None:
    logging.getLogger("motet").info("first\nsecond\r\x1b[31m\u2028third")
    [line] = out.getvalue().splitlines()
    assert line.endswith(r"first\x0asecond\x0d\x1b[31m\x2028third")


def test_libraries_are_quiet_below_warning(out: io.StringIO) -> None:
    logging.getLogger("somebody.elses").info("chatter")
    logging.getLogger("motet").debug("detail")
    assert out.getvalue() == ""


def test_setting_up_twice_does_not_write_twice(out: io.StringIO) -> None:
    configure_logging("info", out)
    logging.getLogger("motet").info("once")
    assert out.getvalue().count("once") == 1


def test_a_terminal_gets_the_time_and_a_file_the_date() -> None:
    record = logging.LogRecord("motet", logging.INFO, "", 0, "hello", (), None)
    record.created = 0.0
    assert OneLineFormatter(has_dates=True).format(record) == "1970-01-01T00:00:00Z info    hello"
    assert len(OneLineFormatter(has_dates=False).format(record)) == len("00:00:00 info    hello")
