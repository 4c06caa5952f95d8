"""The ways in which OpenAI's routes write what goes into the model: `prompt` of completions, `input` of
embeddings.
"""

from server.api.records import TextPrompt, TokenPrompt
from server.errors import BadRequest


def read_prompts(
    value: object, param: str, *, add_special_tokens: bool = True
) -> tuple[TextPrompt | TokenPrompt, ...]:
    """A string, a list of token ids, or a list of the one or the other. Raises: BadRequest."""
    if isinstance(value, str):
        return (TextPrompt(value, add_special_tokens, param=param),)
    if isinstance(value, list) and value:
        if _are_ids(value):
            return (TokenPrompt(tuple(value), param=param),)
        if all(isinstance(part, str) for part in value):
            return tuple(TextPrompt(text, add_special_tokens, param=param) for text in value)
        if all(_are_ids(part) for part in value):
            return tuple(TokenPrompt(tuple(ids), param=param) for ids in value)
    raise BadRequest(
        f"{param} must be a string, a list of token ids, or a list of strings or of lists of token ids, "
        "and not empty",
        param=param,
    )


def _are_ids(value: object) -> bool:
    """Whether this is a list of ids, at least one; a bool is not an id."""
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)
