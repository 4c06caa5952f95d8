"""What the server writes about itself: one line per event, never what a client sent or was sent.

Three things keep words out of the log. Lines about requests are made from `RequestStats`, which has no
text. Exceptions are written as their type and the lines of code they came through; their message may quote
a prompt and is left out. And whatever a library logs passes a filter for query strings, which carry keys
and prompts.
"""

import logging
import re
import sys
import time
import traceback
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:  # the log is set up before anything else is imported
    from server.metrics import RequestStats

_OWN_LOGGERS = ("motet", "server", "adapters")
_QUERY = re.compile(r"\?[^\s\"']*")
_SECRET = re.compile(
    r"(?i)\b(api[_-]?key|api_token|token|authorization|x-api-key)(\"?\s*[=:]\s*\"?)(bearer\s+)?[^\s&\"',]+"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_requests = logging.getLogger("motet.requests")


def configure_logging(level: str = "info", out: TextIO | None = None) -> None:
    """Send all logs to `out` (default: stderr), one line each. May be called again; the last call counts.

    Ours show from `level` up, those of libraries from "warning" up.
    """
    handler = logging.StreamHandler(out or sys.stderr)
    handler.setFormatter(OneLineFormatter(has_dates=not handler.stream.isatty()))
    handler.addFilter(NoQueryStrings())
    root = logging.getLogger()
    for old in tuple(root.handlers):
        if isinstance(old.formatter, OneLineFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(level.upper())


def log_request(stats: "RequestStats") -> None:
    """One line per finished request: ids, counts, times, how it ended."""
    if not _requests.isEnabledFor(logging.INFO):
        return
    timing = stats.timing
    _requests.info(
        "request %s adapter=%s finish=%s n=%d prompt=%d cached=%d generated=%d "
        "queue=%.0fms first=%.0fms total=%.0fms",
        stats.request_id,
        stats.adapter or "-",
        stats.reason,
        stats.n,
        stats.prompt_tokens,
        stats.cached_tokens,
        stats.generated_tokens,
        timing.queue_s * 1e3,
        timing.time_to_first_token_s * 1e3,
        timing.total_s * 1e3,
    )


def without_text(error: BaseException) -> str:
    """An exception in one line: its type and where it came through, newest call last, but not its message."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " > ".join(
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames
    )
    text = f"{type(error).__name__} ({places})" if places else type(error).__name__
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return text if cause is None else f"{text} from {without_text(cause)}"


class NoQueryStrings(logging.Filter):
    """Cuts query strings and secrets out of records, in place; for uvicorn's access log above all."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        cut = _SECRET.sub(r"\1\2***", message)
        if record.name.startswith("uvicorn"):
            cut = _QUERY.sub("?***", cut)
        if cut != message:
            record.msg, record.args = cut, ()
        return True


class OneLineFormatter(logging.Formatter):
    """`time level message`, and an exception as `without_text` shows it."""

    def __init__(self, *, has_dates: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")
        self.converter = time.gmtime if has_dates else time.localtime
        self.datefmt = "%Y-%m-%dT%H:%M:%SZ" if has_dates else "%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record, self.datefmt)} {record.levelname.lower():<7} {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            line += f": {without_text(record.exc_info[1])}"
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", line)
