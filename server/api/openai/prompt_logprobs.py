"""`prompt_logprobs` as vLLM writes them: for each token of the prompt an object of token ids, null for the
first.
"""

from collections.abc import Sequence

from server.api.finishes import json_logprob
from server.api.ports import Tokenizer
from server.types import GeneratedToken


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[GeneratedToken], num_alternatives: int
) -> list[object]:
    """The prompt's own token comes first. Its rank is told where it is among the alternatives, else null."""
    return [_entry(tokenizer, token, num_alternatives) for token in prompt]


def _entry(tokenizer: Tokenizer, token: GeneratedToken, num_alternatives: int) -> object:
    if token.logprob is None:
        return None
    ranked = token.alternatives[:num_alternatives]
    rank = next((i for i, other in enumerate(ranked, 1) if other.token_id == token.id), None)
    entry = {str(token.id): _said(tokenizer, token.id, token.logprob, rank)}
    for i, other in enumerate(ranked, 1):
        entry.setdefault(str(other.token_id), _said(tokenizer, other.token_id, other.logprob, i))
    return entry


def _said(tokenizer: Tokenizer, token_id: int, logprob: float, rank: int | None) -> dict[str, object]:
    return {
        "logprob": json_logprob(logprob),
        "rank": rank,
        "decoded_token": tokenizer.token_text(token_id),
    }
