"""The bytes that a real server puts on the wire, against golden files: what the embedded voices say.

Ids, times and dates differ from run to run and log-probabilities in their last digits: they are replaced
before the comparison. `MOTET_GOLDEN=write pytest tests/e2e/test_raw_streams.py` writes the files anew after
the model was trained.
"""

import json
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.running import RunningServer

GOLDEN = Path(__file__).parent / "golden"
CHAT = {"messages": [{"role": "user", "content": "What is Motet?"}], "stream": True, "max_tokens": 12}
REQUESTS: dict[str, tuple[str, dict[str, object]]] = {
    "chat_base": ("/v1/chat/completions", CHAT),
    "chat_german": ("/v1/chat/completions", {**CHAT, "model": "german"}),
    "chat_usage": ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}),
    "completion_pirate": (
        "/v1/completions",
        {"model": "pirate", "prompt": "What is a prefix cache?", "stream": True, "max_tokens": 6},
    ),
    "lorax_json": (
        "/generate_stream",
        {"inputs": "What is Motet?", "parameters": {"adapter_id": "json", "max_new_tokens": 5}},
    ),
    "lorax_unknown_adapter": (
        "/generate_stream",
        {"inputs": "x", "parameters": {"adapter_id": "no-such-adapter"}},
    ),
    "chat_bad_temperature": ("/v1/chat/completions", {**CHAT, "temperature": -1}),
}
VARYING = (
    (r"chatcmpl-[0-9a-f]+", "chatcmpl-ID"),
    (r"cmpl-[0-9a-f]{8,}", "cmpl-ID"),
    (r"motet-[0-9a-f]{12}", "motet-FINGERPRINT"),
    (r'"created":\d+', '"created":0'),
    (r'_ms":[0-9.e-]+', '_ms":0'),
    (r'"logprob":-?[0-9.e-]+', '"logprob":0'),
    (r'"seed":\d+', '"seed":0'),
    (r"(?m)^(date|x-request-id|x-compute-time): [^\r\n]*", r"\1: -"),
)


def exchange(url: str, path: str, body: dict[str, object]) -> bytes:
    """One request over a socket of its own; everything that comes back."""
    address = urlsplit(url)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    answer = b""
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=60) as connection:
        connection.sendall(head.encode() + content)
        while piece := connection.recv(65536):
            answer += piece
    return answer


def readable(answer: bytes) -> str:
    """The answer with chunk sizes checked and taken out, and what varies replaced."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        plain = b""
        while True:
            size, _, rest = body.partition(b"\r\n")
            piece, ending, body = rest[: int(size, 16)], rest[int(size, 16) :][:2], rest[int(size, 16) + 2 :]
            assert ending == b"\r\n"
            if not piece:
                break
            assert piece.endswith(b"\n\n"), "every chunk is whole events"
            plain += piece
        assert body == b"", "nothing after the last chunk"
        body = plain
    text = (head + b"\n\n" + body).decode("ascii").replace("\r\n", "\n")
    for pattern, constant in VARYING:
        text = re.sub(pattern, constant, text)
    return re.sub(r"(?m)^content-length: \d+$", "content-length: -", text)


@pytest.mark.parametrize("name", list(REQUESTS))
def test_stream_is_the_golden_one_to_the_byte(server: RunningServer, name: str) -> None:
    got = readable(exchange(server.url, *REQUESTS[name]))
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("MOTET_GOLDEN") == "write":
        file.write_text(got)

    assert got == file.read_text()
