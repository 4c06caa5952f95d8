"""What nginx's default configuration adds to the time to first token.

Requests go by turns straight to the server and through an nginx of our own in front of it, one at a time, so
that whatever else the machine does falls on both alike.

    motet serve &
    python -m benchmarks.proxy --url http://127.0.0.1:8000 --requests 100
"""

import argparse
import http.client
import json
import sys
from collections.abc import Sequence
from time import perf_counter
from urllib.parse import urlsplit

from benchmarks.metrics import spread
from benchmarks.nginx import NoNginx, nginx_in_front_of

_BODY = {
    "messages": [{"role": "user", "content": "What is Motet?"}],
    "stream": True,
    "max_tokens": 4,
    "temperature": 0,
}


def first_token_s(port: int) -> float:
    """Seconds from sending a chat request to its first frame, over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    began = perf_counter()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(_BODY), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    line = response.readline()
    took = perf_counter() - began
    response.read()
    connection.close()
    if response.status != 200 or not line.startswith(b"data: {"):
        raise SystemExit(f"the server answers {response.status}: {line[:200]!r}")
    return took


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxy", description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a server on this machine")
    parser.add_argument("--requests", type=int, default=100, help="each way")
    args = parser.parse_args(argv)
    direct = urlsplit(args.url).port or 80
    try:
        with nginx_in_front_of(direct) as through:
            for port in (direct, through):  # the first request finds nothing warm
                first_token_s(port)
            pairs = [(first_token_s(direct), first_token_s(through)) for _ in range(args.requests)]
    except NoNginx as error:
        print(error, file=sys.stderr)
        return 2
    for name, took in (("direct", [a for a, _ in pairs]), ("through nginx", [b for _, b in pairs])):
        all_of_them = spread(took)
        print(f"{name:14} first token p50 {all_of_them.p50 * 1e3:.2f} ms, p99 {all_of_them.p99 * 1e3:.2f} ms")
    added = spread([b - a for a, b in pairs])
    print(f"added, pair by pair: p50 {added.p50 * 1e3:+.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
