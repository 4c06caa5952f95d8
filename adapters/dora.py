"""DoRA (arXiv:2402.09353): the adapter trains the direction of each row of W + s B A, and its length.

    y = b + g (W x + s B A x)          g = m / |W + s B A|, for each output
      = y0 + (g - 1) y0 + g s B A x - (g - 1) b          y0 = W x + b, what the base computes

So a served DoRA adapter is a plain one with g in B, and two vectors: the gain g - 1 and a bias. Lengths come
from |W|, W A^T and A A^T, so that neither W + s B A nor a copy of W is ever made:

    |w + s b A|^2 = |w|^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T          w, b: a row of W and of B
"""

import torch
from torch import Tensor

from adapters.base import BaseWeights
from adapters.types import TargetId

_SLICE_ELEMENTS = 1 << 20  # of B at once: more precise numbers need more room


def factors(
    base: BaseWeights, target: TargetId, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    """g, float64 [out]; infinite or NaN where a row has no length. `a`, `b`, `magnitude` are float32."""
    rank, num_in = a.shape
    projected = base.project(target, a)  # [out, r]
    squared = base.squared_norms(target).double()
    gram = a @ a.t() if rank <= num_in else None  # [r, r]; a rank so high is odd, and must not need more room
    step = max(1, _SLICE_ELEMENTS // max(rank, num_in if gram is None else 0))
    for start in range(0, b.shape[0], step):
        rows = slice(start, start + step)
        mine = b[rows].double()
        crossed = (projected[rows].double() * mine).sum(1)
        if gram is None:
            added = (b[rows] @ a).double().square_().sum(1)
        else:
            added = ((mine @ gram.double()) * mine).sum(1)
        squared[rows] += 2 * scaling * crossed + scaling**2 * added
    return magnitude.double() / torch.sqrt_(squared.clamp_min_(0.0))
