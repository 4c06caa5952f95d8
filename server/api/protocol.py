"""What the application knows of a protocol: the `PROTOCOL` in the routes.py of its package."""

from collections.abc import Callable
from typing import NamedTuple

from starlette.routing import Route

from server.api.docs.operations import Chapter
from server.api.state import ServerState


class Protocol(NamedTuple):
    """`routes`: its table; the first one that fits a path counts. `chapters`: how the table is documented."""

    routes: Callable[[ServerState], list[Route]]
    chapters: tuple[Chapter, ...]
