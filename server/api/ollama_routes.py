"""The table of Ollama's routes, but for `GET /`, which stands beside LoRAX's `POST /`."""

from starlette.routing import Route

from server.api import ollama, ollama_embed, ollama_models
from server.api.http import Resource
from server.api.state import ServerState


def routes(state: ServerState) -> list[Route]:
    refused = ollama_models.refuse_change
    return [
        Route("/api/generate", Resource(post=ollama.generate_endpoint(state))),
        Route("/api/chat", Resource(post=ollama.chat_endpoint(state))),
        Route("/api/embed", Resource(post=ollama_embed.embed_endpoint(state))),
        Route("/api/embeddings", Resource(post=ollama_embed.embeddings_endpoint(state))),
        Route("/api/tags", Resource(get=ollama_models.tags_endpoint(state))),
        Route("/api/ps", Resource(get=ollama_models.ps_endpoint(state))),
        Route("/api/show", Resource(post=ollama_models.show_endpoint(state))),
        Route("/api/version", Resource(get=ollama_models.version_endpoint(state))),
        Route("/api/pull", Resource(post=ollama_models.pull_endpoint(state))),
        Route("/api/push", Resource(post=refused)),
        Route("/api/create", Resource(post=refused)),
        Route("/api/copy", Resource(post=refused)),
        Route("/api/delete", Resource(delete=refused)),
    ]
