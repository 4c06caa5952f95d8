"""What the serving stack adds to each token: from the end of the step that made it to the client's socket.

    runner   ── step ──┤ made                     of every sequence in the step
                       └─ commit, event loop, text, frame, socket ─┤ came     at the receiver

Which token a piece of text brings is not guessed from the time. A request's prompt says its number; its i-th
token is that of the i-th step which sampled it; and that token has come when the text up to its end has,
however the server cut the text into frames. Both clocks are `perf_counter`, which processes share.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from benchmarks.no_cost.receiver import Piece, number_of
from benchmarks.no_cost.runner import FULL_SHARE, StepMark


def arrivals(pieces: Sequence[Piece], ends: Sequence[int]) -> list[float]:
    """When each token of one answer came; the text of the i-th ends at character `ends[i]`.

    Raises: ValueError if the text is not as long as that of all tokens.
    """
    lengths = [piece.num_characters for piece in pieces]
    num_characters = lengths[-1] if lengths else 0
    if num_characters != ends[-1]:
        raise ValueError(f"a text of {ends[-1]} characters came with {num_characters}")
    return [pieces[bisect_left(lengths, end)].at for end in ends]


def added_latencies(marks: Sequence[StepMark], came: Sequence[Sequence[float]], rows: int) -> list[float]:
    """Seconds from made to came, of each token of a step whose batch was about full.

    `came`: by the number of the request, when each of its tokens came.
    """
    enough = FULL_SHARE * rows
    num_made: Counter[int] = Counter()
    added = []
    for mark in marks:
        for sequence in mark.sampled:
            number = number_of(sequence.tokens)
            if mark.num_rows >= enough:
                added.append(came[number][num_made[number]] - mark.ended)
            num_made[number] += 1
    assert min(added, default=1.0) > 0, "a token came before it was made"
    return added
