"""Speaks to a server with Inferless's own client, and lets the inferless package load an app, in an
environment of its own.

Run by `test_inferless.py` as `.venv-inferless/bin/python inferless_client.py WHAT ARGUMENT…`; prints what it
saw as JSON.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def call(url: str, key: str) -> dict[str, Any]:
    """`inferless.call` in all its forms."""
    import inferless

    data = {"prompt": "What is Motet?", "adapter_name": "pirate", "temperature": 0.0, "max_new_tokens": 8}
    heard: list[Any] = []
    thread = inferless.call_async(url, key, data=data, callback=lambda error, answer: heard.append(answer))
    thread.join()
    try:
        inferless.call(url, key, data={"prompt": "x"})
        refusal = "none"
    except Exception as error:  # the package raises plain ones
        refusal = str(error)
    return {
        "answer": inferless.call(url, key, data=data),
        "batch": inferless.call(url, key, data=data, is_batch=True),
        "heard": heard,
        "refusal": refusal,
    }


def load(repository: str, folder: str) -> dict[str, Any]:
    """What our loader hears of an app that imports the real package."""
    import inferless

    sys.path.insert(0, repository)
    from server.inferless.folder import load_app

    app = load_app(Path(folder))
    return {
        "version": inferless.__version__,
        "schema": app.schema.to_json(),
        "request": app.request_class.__name__,
        "json_schema": list(app.request_class._json_schema),
    }


def main() -> None:
    commands: dict[str, Callable[..., dict[str, Any]]] = {"call": call, "load": load}
    print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))


if __name__ == "__main__":
    main()
