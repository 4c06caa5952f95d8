"""What the routes for operators are documented as: probes, numbers, the documentation itself."""

from typing import Literal

from typing_extensions import TypedDict

from server.api.docs.operations import JSON, TEXT, Answer, Chapter, Operation, json_answer, text_answer
from server.errors import Forbidden


class Health(TypedDict):
    """The process is worth keeping."""

    status: Literal["ok", "loading"]


class Unhealthy(TypedDict):
    """The process is going down, or has failed."""

    status: Literal["draining", "failed"]
    error: str
    error_type: str


class Ready(TypedDict):
    """Generation would be accepted."""

    status: Literal["ready"]


class NotReady(TypedDict):
    """Generation would be refused."""

    status: Literal["loading", "draining", "failed", "ready"]
    progress: str
    error: str


class Version(TypedDict):
    version: str


class ServerLoad(TypedDict):
    """How many generation requests are under way."""

    server_load: int


OPERATIONS = Chapter(
    tag="Operation",
    about="For those who run the server.",
    operations=(
        Operation(
            "GET",
            ("/health", "/ping"),
            "Is the process alive?",
            (
                Answer(JSON, Health, "It serves, or will.", {"status": "ok"}),
                Answer(JSON, Unhealthy, "It is going down, or has failed.", status=503),
            ),
            is_open=True,
        ),
        Operation(
            "GET",
            "/ready",
            "Would generation be accepted?",
            (
                Answer(JSON, Ready, "Yes.", {"status": "ready"}),
                Answer(JSON, NotReady, "Not now.", status=503),
            ),
            is_open=True,
        ),
        Operation(
            "GET",
            "/metrics",
            "Metrics for Prometheus",
            (
                Answer(TEXT, str, "In the text format 0.0.4."),
                Answer("application/openmetrics-text", str, "Where Accept prefers it; with exemplars."),
            ),
            about="Not for keys that may use only some adapters, unless the server was started with "
            "`--open-metrics`.",
            refusals=(Forbidden,),
        ),
        Operation(
            "GET",
            "/version",
            "The server's version",
            json_answer(Version, "The version.", {"version": "0.1.0"}),
        ),
        Operation(
            "GET",
            "/load",
            "Requests under way",
            json_answer(ServerLoad, "As vLLM counts them.", {"server_load": 0}),
        ),
        Operation(
            "GET",
            "/",
            "A banner, or the playground",
            (
                *text_answer("The server is there.", "Ollama is running"),
                Answer("text/html", str, "The playground, for clients that accept pages."),
            ),
            is_open=True,
        ),
        Operation(
            "GET",
            "/playground",
            "The playground",
            (Answer("text/html", str, "A page to try the adapters with."),),
            is_open=True,
        ),
        Operation(
            "GET",
            "/openapi.json",
            "This document",
            json_answer(dict[str, object], "An OpenAPI 3.1 document."),
        ),
        Operation(
            "GET",
            "/docs",
            "This document as a page",
            (Answer("text/html", str, "A page that asks nobody else for anything."),),
            is_open=True,
        ),
    ),
)
