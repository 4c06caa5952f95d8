"""Where an Activated LoRA (arXiv:2504.12397) begins: at the last place of a prompt that has its invocation.

Positions before it are the base model's, so their keys and values are shared with it. A prompt without the
invocation is the base model's altogether. What is generated later does not matter. As PEFT has it.
"""

from array import array
from collections.abc import Sequence

_BYTES = 8


def last_start(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where the last occurrence of the invocation, which is not empty, begins in the prompt."""
    text, wanted = array("q", prompt).tobytes(), array("q", invocation).tobytes()
    found = text.rfind(wanted)
    while found % _BYTES and found > 0:  # between two tokens
        found = text.rfind(wanted, 0, found + len(wanted) - 1)
    return found // _BYTES if found >= 0 else None
