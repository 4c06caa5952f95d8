"""From logits to tokens.

Order, for each row: bias, penalties, bans (`logit_edits`), temperature, top_k, top_p, min_p, draw. Rows
without a feature cost nothing: greedy rows are one `max` over the model's own logits; only the others are
copied to float32.

top_k, top_p and min_p each say "keep what is at least this likely", so together they are one threshold a row.
Tokens as likely as the least likely one kept are kept too: the result must not depend on how a sort breaks
ties, since bfloat16 logits have many. The draw is the inverse of the cumulative distribution, in vocabulary
order, at one uniform number that is a function of the row's seed and position alone. So what a row gets does
not depend on its neighbours, on batching or on preemption.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine import sequence
from server.engine.logit_edits import apply_edits, has_edits
from server.engine.plan import RunnerOutput, SampledToken
from server.types import Alternative

_BUCKET = 128  # tokens summed together; the cumulative sum then runs over the buckets, in float64
_HEADS = (
    256,
    8192,
)  # most likely tokens to look at for top_p before everything is sorted (33 ms a row at V = 152k)
_MIN_TEMPERATURE = 1e-5  # below it a float32 quotient says nothing new
_MASK64 = (1 << 64) - 1


class Sampler:
    """Draws one token for each row of logits."""

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    def sample(self, logits: Tensor, sequences: Sequence[sequence.Sequence]) -> RunnerOutput:
        """`logits` [B, V] of the model, row i for sequence i; not changed. One transfer to the host, two if
        some row wants logprobs. A row whose logits are not finite where it matters (NaN, or no finite
        maximum) fails.
        """
        peak, ids = logits.max(-1)  # [B]; NaN wins over everything
        is_good = peak.isfinite()
        special = _Special.of(sequences)
        if special is not None:
            rows = torch.tensor(special.rows, dtype=torch.int64).to(logits.device, non_blocking=True)
            drawn, special_good = self._sample_special(logits[rows], special)
            ids = ids.index_copy(0, rows, drawn)
            is_good = is_good.index_copy(0, rows, special_good & is_good[rows])
        ids_host: list[int] = torch.where(is_good, ids, -1).tolist()
        failed = tuple(item.id for item, token in zip(sequences, ids_host, strict=True) if token < 0)
        logprobs = _logprobs(logits, ids.where(is_good, 0), sequences)  # a failed row's id may be anything
        tokens = tuple(
            SampledToken(item.id, token, *logprobs.get(row, ()))
            for row, (item, token) in enumerate(zip(sequences, ids_host, strict=True))
            if token >= 0
        )
        return RunnerOutput(tokens, failed)

    def _sample_special(self, logits: Tensor, special: "_Special") -> tuple[Tensor, Tensor]:
        """Token ids [R] of the rows that are not plainly greedy, and whether their edited logits have a
        maximum.
        """
        width = -(-self._vocab_size // _BUCKET) * _BUCKET
        work = torch.full((len(logits), width), float("-inf"), dtype=torch.float32, device=logits.device)
        work[:, : self._vocab_size] = logits[:, : self._vocab_size]
        if special.is_edited:
            apply_edits(work, special.sequences, self._vocab_size, self._eos_token_ids)
        peak, ids = work.max(-1)
        num_greedy = special.num_greedy
        if num_greedy < len(logits):
            drawn = _draw_rows(work[num_greedy:], peak[num_greedy:], special.sequences[num_greedy:])
            ids = torch.cat([ids[:num_greedy], drawn])
        return ids, peak.isfinite()


@dataclass(frozen=True, slots=True)
class _Special:
    """The rows that need a float32 copy: greedy ones with edits first, then the ones that are drawn."""

    rows: list[int]
    sequences: list[sequence.Sequence]
    num_greedy: int
    is_edited: bool

    @classmethod
    def of(cls, sequences: Sequence[sequence.Sequence]) -> "_Special | None":
        edited = [has_edits(item) for item in sequences]
        greedy = [row for row, item in enumerate(sequences) if item.sampling.is_greedy and edited[row]]
        drawn = [row for row, item in enumerate(sequences) if not item.sampling.is_greedy]
        rows = greedy + drawn
        if not rows:
            return None
        return cls(rows, [sequences[row] for row in rows], len(greedy), any(edited))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else: splitmix64 (Steele, Lea, Flood 2014) of seed, then
    position.
    """
    bits = _mix(_mix(seed & _MASK64) ^ (position & _MASK64))
    return (bits >> 11) / (1 << 53)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _draw_rows(work: Tensor, peak: Tensor, sequences: Sequence[sequence.Sequence]) -> Tensor:
    """Temperature, thresholds and draw for rows [R, width] of float32 logits with maxima `peak` [R];
    overwrites `work`. Rows without a finite maximum give some id.
    """
    device = work.device
    settings = torch.tensor(  # one move: temperature, log(min_p), uniform
        [
            [max(item.sampling.temperature, _MIN_TEMPERATURE) for item in sequences],
            [item.sampling.min_p for item in sequences],
            [uniform(item.seed, item.num_tokens) for item in sequences],
        ],
        dtype=torch.float64,
    ).to(device, non_blocking=True)
    # The maximum is taken off first: a tiny temperature then sends the others to -inf, not everything to inf.
    scaled = work.sub_(peak[:, None]).div_(settings[0].float()[:, None])
    floor = torch.full((len(sequences),), float("-inf"), dtype=torch.float32, device=device)
    _raise_to_top_k(floor, scaled, [item.sampling.top_k for item in sequences])
    _raise_to_top_p(floor, scaled, [item.sampling.top_p for item in sequences])
    if any(item.sampling.min_p > 0 for item in sequences):
        floor = torch.maximum(floor, settings[1].log().float())
    weights = scaled.exp().masked_fill_(scaled < floor[:, None], 0.0)
    return _invert(weights, settings[2])


def _raise_to_top_k(floor: Tensor, scaled: Tensor, top_k: Sequence[int]) -> None:
    rows = [row for row, k in enumerate(top_k) if 0 < k < scaled.shape[1]]
    if not rows:
        return
    index = torch.tensor([rows, [top_k[row] - 1 for row in rows]], dtype=torch.int64).to(
        floor.device, non_blocking=True
    )
    best = scaled[index[0]].topk(max(top_k[row] for row in rows), dim=-1).values
    floor[index[0]] = best.gather(1, index[1][:, None])[:, 0]


def _raise_to_top_p(floor: Tensor, scaled: Tensor, top_p: Sequence[float]) -> None:
    """The nucleus (arXiv:1904.09751) of what top_k left."""
    rows = [row for row, p in enumerate(top_p) if p < 1.0]
    if not rows:
        return
    index = torch.tensor(rows, dtype=torch.int64).to(floor.device, non_blocking=True)
    wanted = torch.tensor([top_p[row] for row in rows], dtype=torch.float64).to(
        floor.device, non_blocking=True
    )
    picked, lowest = scaled[index], floor[index]
    weights = picked.exp().masked_fill_(picked < lowest[:, None], 0.0)
    wanted *= _bucket_mass(weights)[:, -1]
    heads = [head for head in _HEADS if head < picked.shape[1]] if floor.device.type == "cpu" else []
    found = torch.empty_like(lowest)
    left = torch.arange(len(rows), device=floor.device)
    for head in (*heads, picked.shape[1]):
        # A row's answer is the same whichever head finds it: sorted values and running sums are prefixes.
        values = picked[left].topk(head, dim=-1).values if head < picked.shape[1] else _sorted(picked[left])
        mass = values.exp().masked_fill_(values < lowest[left, None], 0.0).double().cumsum(-1)
        needed = (mass < wanted[left, None]).sum(-1)
        is_found = needed < head
        needed = needed.clamp_(max=head - 1)
        found[left] = values.gather(1, needed[:, None])[:, 0]
        if head == picked.shape[1]:
            break
        left = left[~is_found]  # on CPU only, where this is no synchronisation
        if not len(left):
            break
    floor[index] = torch.maximum(lowest, found)


def _sorted(values: Tensor) -> Tensor:
    return values.sort(dim=-1, descending=True).values


def _bucket_mass(weights: Tensor) -> Tensor:
    """[R, width] -> [R, width / bucket]: the running sum over buckets. Each bucket is summed for itself, so
    that the result does not depend on how many rows there are.
    """
    return weights.view(len(weights), -1, _BUCKET).sum(-1).double().cumsum(-1)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative weight is above uniform * total. [R, width], [R] float64 -> [R]."""
    mass = _bucket_mass(weights)  # [R, buckets]
    target = uniforms * mass[:, -1]
    target = torch.minimum(target, torch.nextafter(mass[:, -1], torch.zeros_like(target)))[:, None]
    bucket = torch.searchsorted(mass, target, right=True).clamp_(max=mass.shape[1] - 1)  # [R, 1]
    before = torch.where(bucket > 0, mass.gather(1, (bucket - 1).clamp_(min=0)), 0.0)
    inside = weights.view(len(weights), -1, _BUCKET).take_along_dim(bucket[..., None], dim=1)[
        :, 0
    ]  # [R, bucket]
    within = inside.double().cumsum(-1)
    # The two sums of one bucket differ in the last bits: stay below the second, whose last step has weight.
    rest = torch.minimum(target - before, torch.nextafter(within[:, -1:], torch.zeros_like(target)))
    offset = torch.searchsorted(within, rest, right=True).clamp_(max=_BUCKET - 1)
    return (bucket * _BUCKET + offset)[:, 0]


def _logprobs(
    logits: Tensor, ids: Tensor, sequences: Sequence[sequence.Sequence]
) -> dict[int, tuple[float, tuple[Alternative, ...]]]:
    """By row: the log-probability of its token and of the most likely ones, by the model's own distribution.

    Rows are taken by their number of alternatives, so that ties are cut for each as if it were alone.
    """
    by_count: defaultdict[int, list[int]] = defaultdict(list)
    for row, item in enumerate(sequences):
        if item.sampling.num_logprobs is not None:
            by_count[min(item.sampling.num_logprobs, logits.shape[1])].append(row)
    if not by_count:
        return {}
    parts: list[Tensor] = []
    for count, rows in by_count.items():
        index = torch.tensor(rows, dtype=torch.int64).to(logits.device, non_blocking=True)
        logprobs = logits[index].float().log_softmax(-1)
        chosen = logprobs.gather(1, ids[index, None])
        best = logprobs.topk(count, dim=-1)
        parts.append(
            torch.cat([chosen, best.values, best.indices.double()], dim=1).flatten()
        )  # ids exact in float64
    numbers: list[float] = torch.cat([part.double() for part in parts]).tolist()
    found: dict[int, tuple[float, tuple[Alternative, ...]]] = {}
    at = 0
    for count, rows in by_count.items():
        for row in rows:
            chosen_value, values = numbers[at], numbers[at + 1 : at + 1 + count]
            tokens = numbers[at + 1 + count : at + 1 + 2 * count]
            alternatives = tuple(Alternative(int(t), v) for t, v in zip(tokens, values, strict=True))
            found[row] = (chosen_value, alternatives)
            at += 1 + 2 * count
    return found
