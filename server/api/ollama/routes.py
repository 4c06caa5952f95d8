"""The table of Ollama's routes, but for `GET /`, which stands beside LoRAX's `POST /`."""

from starlette.routing import Route

from server.api.http import Resource
from server.api.ollama import embed, models, wish
from server.api.ollama.chapter import CHAPTER
from server.api.protocol import Protocol
from server.api.state import ServerState


def _routes(state: ServerState) -> list[Route]:
    refused = models.refuse_change
    return [
        Route("/api/generate", Resource(post=wish.generate_endpoint(state))),
        Route("/api/chat", Resource(post=wish.chat_endpoint(state))),
        Route("/api/embed", Resource(post=embed.embed_endpoint(state))),
        Route("/api/embeddings", Resource(post=embed.embeddings_endpoint(state))),
        Route("/api/tags", Resource(get=models.tags_endpoint(state))),
        Route("/api/ps", Resource(get=models.ps_endpoint(state))),
        Route("/api/show", Resource(post=models.show_endpoint(state))),
        Route("/api/version", Resource(get=models.version_endpoint(state))),
        Route("/api/pull", Resource(post=models.pull_endpoint(state))),
        Route("/api/push", Resource(post=refused)),
        Route("/api/create", Resource(post=refused)),
        Route("/api/copy", Resource(post=refused)),
        Route("/api/delete", Resource(delete=refused)),
    ]


PROTOCOL = Protocol(_routes, (CHAPTER,))
