"""A running server, as commands see it: JSON over HTTP, and streams. Standard library only."""

import argparse
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any

USUAL_URL = "http://127.0.0.1:8000"
_WAIT_S = 600.0


class ServerFailed(Exception):
    """It does not answer, or refuses; the message is one line, and says what to do where that is known."""


class RemoteServer:
    """Raises ServerFailed throughout."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._api_key = api_key

    def get(self, path: str) -> Any:
        return self._json("GET", path)

    def post(self, path: str, body: object = None) -> Any:
        return self._json("POST", path, body)

    def delete(self, path: str) -> Any:
        return self._json("DELETE", path)

    def events(self, path: str, body: object) -> Iterator[dict[str, Any]]:
        """What an OpenAI stream says, one event at a time. Closing the iterator ends the request."""
        with self._open("POST", path, body) as response, self._understood():
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:"):
                    continue
                if data == b"[DONE]":
                    return
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise ServerFailed(_reason(event))
                yield event
        raise ServerFailed("the answer was cut off")

    def _json(self, method: str, path: str, body: object = None) -> Any:
        with self._open(method, path, body) as response, self._understood():
            return json.loads(response.read() or b"null")

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Around what is read."""
        try:
            yield
        except (OSError, HTTPException):
            raise ServerFailed(f"the connection to {self.url} is lost") from None
        except ValueError:
            raise ServerFailed(f"what answers at {self.url} is no Motet") from None

    def _open(self, method: str, path: str, body: object) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310
            response: HTTPResponse = urllib.request.urlopen(request, timeout=_WAIT_S)  # noqa: S310
        except urllib.error.HTTPError as error:
            raise ServerFailed(_refusal(error)) from None
        except (OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerFailed(
                f"no server answers at {self.url} ({reason}); start one with `motet serve`, or say --url"
            ) from None
        return response


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """How a command is told which server it is about."""
    parser.add_argument(
        "--url", default=os.environ.get("MOTET_URL") or USUAL_URL, help=f"default {USUAL_URL}"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("MOTET_API_KEY"), metavar="KEY", help="default $MOTET_API_KEY"
    )


def server_of(flags: argparse.Namespace) -> RemoteServer:
    return RemoteServer(flags.url, flags.api_key)


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        said = _reason(json.loads(error.read()))
    except (ValueError, OSError):
        said = f"{error.code} {error.reason}"
    return f"{said} (--api-key, or MOTET_API_KEY)" if error.code == 401 else said


def _reason(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or "the server refused").split())
