"""Asks a server for /health at a steady pace until its standard input ends, then prints how long that took.

A process of its own, with blocking sockets and nothing else to do, so that what it measures is the server's
delay and not that of a busy client. Each question is a new connection, as a load balancer's is.

    python -m benchmarks.no_cost.health HOST PORT
"""

import http.client
import json
import sys
import threading
from dataclasses import asdict
from time import perf_counter, sleep

from benchmarks.metrics import spread

PERIOD_S = 0.02
TIMEOUT_S = 10.0


def ask(host: str, port: int) -> float:
    """Seconds until the answer to one question was read."""
    began = perf_counter()
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"/health answers {response.status}")
    return perf_counter() - began


def main(host: str, port: int) -> None:
    stop = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    took = []
    while not stop.is_set():
        took.append(ask(host, port))
        sleep(PERIOD_S)
    print(json.dumps(asdict(spread(took))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
