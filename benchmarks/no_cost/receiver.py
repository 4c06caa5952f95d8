"""Puts streams on a server and prints when each piece of their texts came out of the socket.

Its own work must not hide in what it measures: one thread, plain sockets, the clock read as soon as `recv`
returns. What came is looked at when all of it has come. Each request is a connection of its own, which the
server closes: that is how its end is seen without reading it.

It never sleeps. A client that does, on the server's own machine, is woken by the very `send` that is being
timed, and on a virtual machine that is most of it (29 us by 12). What sends to a client elsewhere wakes
nobody. And it only gets the time that nobody else wants, or now and then a thread of the server would wait
for the end of its slice: where that makes it late, the server looks slower than it is.

    python -m benchmarks.no_cost.receiver --port 8000 --streams 64 --rounds 3 ...
"""

import argparse
import gc
import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from selectors import EVENT_READ, DefaultSelector
from time import perf_counter

from httptools import HttpResponseParser

from benchmarks.sse import SseParser

HOST = "127.0.0.1"
READ_BYTES = 2**16
TIMEOUT_S = 60.0  # of silence on all streams
DIGIT = 256  # a request's number is its prompt's first two tokens: any vocabulary has as many


@dataclass(frozen=True, slots=True)
class Load:
    """The streams begin evenly over `ramp_s`; each asks `rounds` times, one after the other."""

    port: int
    model: str
    streams: int
    rounds: int
    ramp_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What one `recv` returned, and the perf_counter seconds right after."""

    at: float
    raw: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """The first `num_characters` of a text were there at `at`, and not before."""

    at: float
    num_characters: int


def prompt_of(number: int, num_tokens: int) -> list[int]:
    """A prompt that says which request it belongs to, of two tokens at least."""
    assert number < DIGIT * DIGIT
    return [number // DIGIT, number % DIGIT, *(i % DIGIT for i in range(num_tokens - 2))]


def number_of(prompt: Sequence[int]) -> int:
    """The request that `prompt_of` made this prompt for."""
    return prompt[0] * DIGIT + prompt[1]


def receive(load: Load) -> list[list[Reading]]:
    """Everything that came, by the number of the request. Raises: TimeoutError, OSError."""
    readings: list[list[Reading]] = [[] for _ in range(load.streams * load.rounds)]
    requests = [_request(load, number) for number in range(len(readings))]
    began = perf_counter()
    starts = [began + load.ramp_s * i / load.streams for i in range(load.streams)]
    num_begun = num_ended = 0
    with DefaultSelector() as selector:

        def ask(number: int) -> None:
            connection = socket.create_connection((HOST, load.port), TIMEOUT_S)
            connection.sendall(requests[number])
            connection.setblocking(False)
            selector.register(connection, EVENT_READ, number)

        last = began
        while num_ended < load.streams:
            while num_begun < load.streams and starts[num_begun] <= perf_counter():
                ask(num_begun * load.rounds)
                num_begun += 1
            ready = selector.select(0)
            if ready:
                last = perf_counter()
            elif perf_counter() > last + TIMEOUT_S:
                raise TimeoutError(f"no stream brought anything for {TIMEOUT_S:g} s")
            ended = []
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                raw = key.fileobj.recv(READ_BYTES)
                at = perf_counter()
                if raw:
                    readings[key.data].append(Reading(at, raw))
                else:
                    ended.append(key)
            for key in ended:  # after those that have something: a connection takes longer than a reading
                assert isinstance(key.fileobj, socket.socket)
                selector.unregister(key.fileobj)
                key.fileobj.close()
                if (key.data + 1) % load.rounds:
                    ask(key.data + 1)
                else:
                    num_ended += 1
    return readings


def pieces(readings: Sequence[Reading]) -> list[Piece]:
    """How the text of one answer grew. Raises: RuntimeError if it is not a whole and good one."""
    body = _Body()
    parser = HttpResponseParser(body)
    for reading in readings:
        body.at = reading.at
        parser.feed_data(reading.raw)
    if not body.is_whole or parser.get_status_code() != 200:
        raise RuntimeError(f"not a whole answer: {b''.join(reading.raw for reading in readings)[:500]!r}")
    events, num_characters, found = SseParser(), 0, []
    for part in body.parts:
        added = sum(len(_text(event)) for event in events.feed(part.raw))
        if added:
            num_characters += added
            found.append(Piece(part.at, num_characters))
    return found


class _Body:
    """What the parser of an answer finds, as it comes."""

    def __init__(self) -> None:
        self.at = 0.0  # of what is being parsed
        self.parts: list[Reading] = []
        self.is_whole = False

    def on_body(self, raw: bytes) -> None:
        self.parts.append(Reading(self.at, raw))

    def on_message_complete(self) -> None:
        self.is_whole = True


def _text(event: bytes) -> str:
    if event == b"[DONE]":
        return ""
    body = json.loads(event)
    if "choices" not in body:
        raise RuntimeError(f"a stream failed: {event.decode()}")
    return "".join(choice["text"] for choice in body["choices"])


def _request(load: Load, number: int) -> bytes:
    body = json.dumps(
        {
            "model": load.model,
            "prompt": prompt_of(number, load.prompt_tokens),
            "max_tokens": load.output_tokens,
            "temperature": 0,
            "stream": True,
        }
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{load.port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode("ascii")


def _give_way() -> None:
    """To every thread of whoever else."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.no_cost.receiver")
    parser.add_argument("--model", required=True)
    for name in ("--port", "--streams", "--rounds", "--prompt-tokens", "--output-tokens"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--ramp-s", type=float, required=True)
    load = Load(**vars(parser.parse_args(argv)))
    gc.disable()
    _give_way()
    answers = receive(load)
    json.dump([[asdict(piece) for piece in pieces(answer)] for answer in answers], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
