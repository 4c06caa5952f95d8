"""Temperature, top_k, top_p, min_p, typical_p and the draw itself.

    scale   x = (logit - largest logit) / temperature, in float32: x <= 0, so exp(x) never overflows
    keep    x >= floor: top_k, top_p and min_p each keep "what is at least this likely", so that together
            they are one floor
    typical |x - mean x| <= limit: of what is kept, what is about as surprising as a token is on average
    draw    the first token, in vocabulary order, whose cumulative exp(x) is above
            uniform(seed, position) * total

Tokens as likely as the least likely one kept are kept too: the result must not depend on how a sort breaks
ties, and bfloat16 logits have many. A row's token is a function of its own logits and settings alone,
whatever else is in the batch.

On CPU most rows that are filtered are done with the 256 most likely tokens, and a row that is not is worked
on alone, so that it stays in the cache. Elsewhere all rows go together and nothing is read back.

typical_p comes last of all, where transformers has it, and TGI and LoRAX too, who know no min_p. It may drop
the most likely token, to which min_p compares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine import sequence
from server.model.transfer import to_device
from server.types import SamplingParams

_HEAD = 256  # most likely tokens that are looked at first on CPU
_BUCKET = 128  # tokens summed together; the running sum then goes over the buckets, in float64
_MIN_TEMPERATURE = 1e-5  # below it a float32 quotient says nothing new
_MAX_DISTANCE_BITS = 0x42D00000  # 104.0 as float32: exp(-104) is 0
_BISECTIONS = 31  # of the integers from -1 to _MAX_DISTANCE_BITS
_BIN_SHIFT = 18  # bits of a float that share a bin: exponent and five digits are left, 4000 bins
_MASK64 = (1 << 64) - 1


def draw(logits: Tensor, peak: Tensor, sequences: Sequence[sequence.Sequence]) -> Tensor:
    """Ids [R] for logits [R, V] with row maxima `peak` [R]. A row without a finite maximum gives some id."""
    rows = _Rows.of(logits, peak, sequences)
    if logits.device.type != "cpu":
        return _draw_from_all(rows)
    ids = torch.empty(len(sequences), dtype=torch.int64)
    filtered = [row for row, item in enumerate(sequences) if _is_decided_by_head(item.sampling)]
    left = set(range(len(sequences)))
    if filtered:
        drawn = _draw_from_head(rows.take(filtered)).tolist()
        done = {row: token for row, token in zip(filtered, drawn, strict=True) if token >= 0}
        left -= done.keys()
        ids[list(done)] = torch.tensor(list(done.values()), dtype=torch.int64)
    for row in left:
        ids[row] = _draw_from_all(rows.take([row]))[0]
    return ids


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of its arguments alone: splitmix64 (Steele, Lea, Flood 2014), nested."""
    bits = _mix(_mix(seed & _MASK64) ^ (position & _MASK64))
    return (bits >> 11) / (1 << 53)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _is_filtered(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _is_decided_by_head(sampling: SamplingParams) -> bool:
    """Whether the most likely tokens may be all that matters: the average of typical_p is over all."""
    return _is_filtered(sampling) and sampling.typical_p >= 1.0


@dataclass(frozen=True, slots=True)
class _Rows:
    """Logits with what is asked of each row; a setting of which no row makes use is None."""

    logits: Tensor  # [R, V]
    peak: Tensor  # [R, 1] float32
    temperature: Tensor  # [R, 1] float32
    uniforms: Tensor  # [R, 1] float64
    last_kept: Tensor | None  # [R, 1] int64 rank of the least likely token that top_k keeps; V - 1: all
    top_p: Tensor | None  # [R, 1] float64
    min_p: Tensor | None  # [R, 1] float32, the logarithm
    typical_p: Tensor | None  # [R, 1] float64
    max_k: int  # largest rank of `last_kept` of a row that uses it, plus 1

    @classmethod
    def of(cls, logits: Tensor, peak: Tensor, sequences: Sequence[sequence.Sequence]) -> "_Rows":
        size, asked = logits.shape[1], [item.sampling for item in sequences]
        kept = [params.top_k if 0 < params.top_k < size else size for params in asked]
        on_host = torch.tensor(  # one move
            [
                [max(params.temperature, _MIN_TEMPERATURE) for params in asked],
                [uniform(item.seed, item.num_tokens) for item in sequences],
                [k - 1 for k in kept],
                [params.top_p for params in asked],
                [params.min_p for params in asked],
                [params.typical_p for params in asked],
            ],
            dtype=torch.float64,
        )
        numbers = to_device(on_host, logits.device)[:, :, None]
        return cls(
            logits=logits,
            peak=peak[:, None].float(),
            temperature=numbers[0].float(),
            uniforms=numbers[1],
            last_kept=numbers[2].long() if min(kept) < size else None,
            top_p=numbers[3] if any(params.top_p < 1.0 for params in asked) else None,
            min_p=numbers[4].log().float() if any(params.min_p > 0.0 for params in asked) else None,
            typical_p=numbers[5] if any(params.typical_p < 1.0 for params in asked) else None,
            max_k=max((k for k in kept if k < size), default=0),
        )

    def take(self, rows: list[int]) -> "_Rows":
        """Some of the rows, on CPU; settings that none of them uses may stay where they cost nothing."""
        index = torch.tensor(rows, dtype=torch.int64)
        typical_p = None if self.typical_p is None else self.typical_p[index]
        is_all = len(rows) == len(self.logits)
        return _Rows(
            logits=self.logits if is_all else self.logits[index],
            peak=self.peak[index],
            temperature=self.temperature[index],
            uniforms=self.uniforms[index],
            last_kept=None if self.last_kept is None else self.last_kept[index],
            top_p=None if self.top_p is None else self.top_p[index],
            min_p=None if self.min_p is None else self.min_p[index],
            typical_p=None if typical_p is None or bool((typical_p >= 1.0).all()) else typical_p,
            max_k=self.max_k,
        )

    def scaled(self) -> Tensor:
        """x [R, width], padded with -inf to whole buckets."""
        num_rows, size = self.logits.shape
        width = -(-size // _BUCKET) * _BUCKET
        x = torch.empty(num_rows, width, dtype=torch.float32, device=self.logits.device)
        x[:, :size] = self.logits
        x[:, size:] = float("-inf")
        return x.sub_(self.peak).div_(self.temperature)


def _draw_from_all(rows: _Rows) -> Tensor:
    """Token ids [R], with the whole vocabulary in memory."""
    return _invert(_kept_weights(rows), rows.uniforms)


def _kept_weights(rows: _Rows) -> Tensor:
    """exp(x) [R, width] of the tokens that are kept, 0 of the others."""
    x = rows.scaled()
    weights = x.exp()
    floor: Tensor | None = None  # [R, 1]
    if rows.last_kept is not None and rows.max_k:
        best = x.topk(rows.max_k, dim=-1).values
        floor = best.gather(1, rows.last_kept.clamp(max=rows.max_k - 1))
        floor = floor.masked_fill(rows.last_kept >= rows.max_k, float("-inf"))
        weights.masked_fill_(x < floor, 0.0)
    if rows.top_p is not None:
        floor = _larger(floor, _nucleus_floor(x, weights, rows.top_p))
    if rows.min_p is not None:
        floor = _larger(floor, rows.min_p)
    if floor is not None:
        weights.masked_fill_(x < floor, 0.0)
    if rows.typical_p is not None:
        distance = _distance_from_mean(x, weights)
        limit = -_nucleus_floor(-distance, weights, rows.typical_p)
        weights.masked_fill_(distance > limit, 0.0)
    return weights


def _distance_from_mean(x: Tensor, weights: Tensor) -> Tensor:
    """How far each token's surprise is from the entropy, arXiv:2202.00666: |x - mean of x|. [R, width]

    The surprise of a token is log(total) - x, and the entropy is the mean of that.
    """
    products = (weights * x).masked_fill_(weights == 0.0, 0.0)  # 0 * -inf is no number
    mean = _running_mass(products)[:, -1:] / _running_mass(weights)[:, -1:]
    return (x - mean.float()).abs_()


def _larger(floor: Tensor | None, other: Tensor) -> Tensor:
    return other if floor is None else torch.maximum(floor, other)


def _nucleus_floor(x: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """The largest floor under x that keeps a share of at least top_p of the weights (arXiv:1904.09751).
    x <= 0, whatever it measures. [R, 1]

    By bisection over the bits of -x, which for positive floats are in the order of the numbers: 31 sums,
    whatever the distribution, where a sort of 150,000 tokens takes ten times as long.
    """
    if len(x) == 1 and x.device.type == "cpu":
        return _nucleus_floor_of_row(x[0], weights[0], top_p)
    distance = x.abs()
    total = _running_mass(weights)[:, -1:]
    wanted = top_p * total
    low = torch.full(wanted.shape, -1, dtype=torch.int32, device=x.device)  # keeps too little
    high = torch.full_like(low, _MAX_DISTANCE_BITS)  # keeps enough
    for _ in range(_BISECTIONS):
        middle = low + torch.div(high - low, 2, rounding_mode="floor")
        kept = weights.masked_fill(distance > middle.view(torch.float32), 0.0)
        is_enough = (_running_mass(kept)[:, -1:] >= wanted) & (middle >= 0)
        high, low = torch.where(is_enough, middle, high), torch.where(is_enough, low, middle)
    return (-high.view(torch.float32)).masked_fill_(top_p >= 1.0, float("-inf"))


def _nucleus_floor_of_row(x: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """The same for one row on CPU: find the bin that the floor is in, then sort the bin. [1, 1]"""
    if float(top_p) >= 1.0:
        return torch.full((1, 1), float("-inf"))
    bins = x.abs().view(torch.int32) >> _BIN_SHIFT  # ascending bins hold descending x
    mass = torch.bincount(bins, weights=weights.double()).cumsum(0)
    wanted = float(top_p) * mass[-1]
    chosen = int(torch.searchsorted(mass, wanted).clamp_(max=len(mass) - 1))
    is_inside = bins == chosen
    members, order = x[is_inside].sort(descending=True)
    before = mass[chosen - 1] if chosen else 0.0
    within = weights[is_inside][order].double().cumsum(0) + before
    place = int(torch.searchsorted(within, wanted).clamp_(max=len(members) - 1))
    return members[place].view(1, 1)


def _running_mass(weights: Tensor) -> Tensor:
    """[R, width] -> [R, width / bucket] float64. Each bucket is summed for itself, so that the result does
    not depend on how many rows there are."""
    return weights.view(len(weights), -1, _BUCKET).sum(-1).double().cumsum(-1)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative weight is above uniform * total. [R, width], [R, 1] -> [R]."""
    mass = _running_mass(weights)  # [R, buckets]
    target = _below(uniforms * mass[:, -1:], mass[:, -1:])
    bucket = torch.searchsorted(mass, target, right=True).clamp_(max=mass.shape[1] - 1)  # [R, 1]
    before = mass.gather(1, (bucket - 1).clamp_(min=0)).masked_fill_(bucket == 0, 0.0)
    inside = weights.view(len(weights), -1, _BUCKET).take_along_dim(bucket[..., None], dim=1)[:, 0]
    within = inside.double().cumsum(-1)  # [R, bucket]
    # The two sums of one bucket differ in their last bits: stay below the second, whose last step has weight.
    rest = _below(target - before, within[:, -1:])
    offset = torch.searchsorted(within, rest, right=True).clamp_(max=_BUCKET - 1)
    return (bucket * _BUCKET + offset)[:, 0]


def _below(target: Tensor, total: Tensor) -> Tensor:
    """`target`, or the number before `total` where rounding has taken it there."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def _draw_from_head(rows: _Rows) -> Tensor:
    """Token ids [R] of rows that can be decided by their most likely tokens, -1 for the others. CPU."""
    size = rows.logits.shape[1]
    best = rows.logits.topk(min(_HEAD, size), dim=-1)  # [R, head]
    x = (best.values.float() - rows.peak) / rows.temperature
    weights = x.exp()
    floor = torch.full_like(rows.peak, float("-inf"))
    if rows.last_kept is not None:
        found = x.gather(1, rows.last_kept.clamp(max=x.shape[1] - 1))
        floor = found.masked_fill(rows.last_kept >= x.shape[1], float("-inf"))
    if rows.top_p is not None:
        floor = torch.maximum(floor, _head_nucleus_floor(rows, x, weights, floor))
    if rows.min_p is not None:
        floor = torch.maximum(floor, rows.min_p)
    is_decided = (floor > x[:, -1:]) | (size <= _HEAD)  # else tokens beyond the head may be kept as well
    tokens, order = best.indices.sort(dim=-1)
    kept = weights.masked_fill(x < floor, 0.0).gather(1, order).double().cumsum(-1)
    place = torch.searchsorted(kept, _below(rows.uniforms * kept[:, -1:], kept[:, -1:]), right=True)
    drawn = tokens.gather(1, place.clamp_(max=x.shape[1] - 1))
    return drawn.masked_fill(~is_decided, -1)[:, 0]


def _head_nucleus_floor(rows: _Rows, x: Tensor, weights: Tensor, floor: Tensor) -> Tensor:
    """The floor of top_p where the head holds the nucleus, else -inf. [R, 1]"""
    assert rows.top_p is not None
    mass = weights.masked_fill(x < floor, 0.0).double().cumsum(-1)
    total = mass[:, -1:].clone()
    for row in torch.nonzero((floor[:, 0] == float("-inf")) & (rows.top_p[:, 0] < 1.0)).flatten().tolist():
        everything = rows.take([row]).scaled().exp()  # no top_k: of the whole vocabulary
        total[row] = _running_mass(everything)[0, -1]
    needed = (mass < rows.top_p * total).sum(-1, keepdim=True)
    found = x.gather(1, needed.clamp(max=x.shape[1] - 1))
    return found.masked_fill((needed >= x.shape[1]) | (rows.top_p >= 1.0), float("-inf"))
