"""Folders as trainers leave them: a base's tokenizer, and what `save_pretrained` writes beside adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from tests import made_tokenizers

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"

Change = Callable[[Any], None]
"""Of the transformers tokenizer, between loading the base's and saving it beside an adapter."""


def base_folder(
    folder: Path,
    kind: str = "byte_level",
    tokenizer_class: str = "PreTrainedTokenizerFast",
    *,
    template: str | None = CHATML,
    **config: object,
) -> Path:
    """One of `made_tokenizers`, saved as the tokenizer of a model."""
    folder.mkdir(parents=True)
    made_tokenizers.KINDS[kind]().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>", **config}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def reference(folder: Path) -> Any:
    """What transformers makes of a folder."""
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def save_beside(adapter: Path, base: Path, change: Change = lambda tokenizer: None) -> Path:
    """What a trainer does that has loaded the base's tokenizer, and perhaps changed it."""
    tokenizer = reference(base)
    change(tokenizer)
    adapter.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(adapter))
    return adapter


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place; one that is not there begins empty."""
    value = json.loads(file.read_text()) if file.exists() else {}
    change(value)
    file.write_text(json.dumps(value))
