"""What runs in a sandbox, `python -m server.text.sandbox_child WORK MEMORY_BYTES CPU_S`. Nothing imports it.

It confines itself before it reads anything of a stranger's. The clocks are the system's and end the process
without asking it, wherever it is: in a loop of a template, in the middle of a regular expression, or because
its parent died and nobody would. Processor time is what counts; the wall's is a backstop.

What goes wrong with a job is its answer: {"refused": why}.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from server.text.sandbox import line_of, read_frame, write_frame

Answer = tuple[dict[str, object], list[bytes]]
Handler = Callable[[dict[str, Any], list[bytes]], Answer]

_NICENESS = 10
_WALL_FACTOR = 10  # seconds of the wall's clock for one of the processor's: others may be using it
_MAX_TEXT_CHARS = 16 * 2**20
_MAX_REASON_CHARS = 500


def main() -> None:
    """Read jobs and answer them, until there are no more."""
    work, memory_bytes, cpu_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    jobs, answers = _take_pipes()
    _confine(memory_bytes)
    handle = _HANDLERS[work]()
    while True:
        try:
            job, blobs = read_frame(jobs)
        except EOFError:
            return
        with _timed(cpu_s):
            try:
                answer, texts = handle(job, blobs)
            except MemoryError:
                answer, texts = {"refused": "it needs too much memory"}, []
            except Exception as error:  # a stranger's program or file: whatever it raises is about it
                answer, texts = {"refused": _reason(error)}, []
            write_frame(answers, line_of(answer, texts), texts)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Our ends of the pipes, out of reach of whatever prints or reads."""
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return jobs, answers


def _confine(memory_bytes: int) -> None:
    os.nice(_NICENESS)
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(limit, (value, value))


@contextmanager
def _timed(cpu_s: float) -> Iterator[None]:
    """End the process if what is done inside takes longer."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, cpu_s * _WALL_FACTOR)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _reason(error: Exception) -> str:
    """What an exception says, as a line of bounded length."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_REASON_CHARS else f"{text[:_MAX_REASON_CHARS]}..."


def _templates() -> Handler:
    from transformers.utils.chat_template_utils import render_jinja_template

    def handle(job: dict[str, Any], blobs: list[bytes]) -> Answer:
        """{"messages", "options", "variables"} and the template: its text. messages null: it is only read."""
        template = blobs[0].decode("utf-8")
        messages = job["messages"]
        if messages is None:
            render_jinja_template(conversations=[], chat_template=template)
            return {}, []
        # As `apply_chat_template` does it: to a template, null is the same as nothing.
        messages = [{key: value for key, value in one.items() if value is not None} for one in messages]
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=template, **job["options"], **job["variables"]
        )
        text: str = rendered[0]
        if len(text) > _MAX_TEXT_CHARS:
            return {"refused": f"it makes more than {_MAX_TEXT_CHARS} characters"}, []
        return {}, [text.encode("utf-8", "surrogatepass")]

    return handle


def _tokenizers() -> Handler:
    from server.text.tokenizer_comparison import compare

    def handle(job: dict[str, Any], blobs: list[bytes]) -> Answer:
        """{"base"}, their tokenizer.json and ours: what `compare` finds."""
        theirs, ours = blobs
        return compare(theirs, ours, job["base"]), []

    return handle


_HANDLERS: Mapping[str, Callable[[], Handler]] = {"templates": _templates, "tokenizers": _tokenizers}

if __name__ == "__main__":
    main()
