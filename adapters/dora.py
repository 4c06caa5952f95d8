"""DoRA (arXiv:2402.09353): the adapter trains the direction of each row of W + s B A, and its length.

    y = b + g (W x + s B A x)          g = m / |W + s B A|, for each output
      = y0 + (g - 1) y0 + g s B A x - (g - 1) b          y0 = W x + b, what the base computes

So a served DoRA adapter is a plain one with g in B, and two vectors: the gain g - 1 and a bias. Lengths come
from |W|, W A^T and A A^T, so that neither W + s B A nor a copy of W is ever made:

    |w + s b A|^2 = |w|^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T          w, b: a row of W and of B
"""

from torch import Tensor

from adapters.base import BaseWeights
from adapters.types import TargetId


def factors(
    base: BaseWeights, target: TargetId, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    """g, float64 [out]; infinite or NaN where a row has no length. `a`, `b`, `magnitude` are float32."""
    small_a, small_b = a.double(), b.double()
    crossed = (base.project(target, a).double() * small_b).sum(1)
    added = ((small_b @ (small_a @ small_a.t())) * small_b).sum(1)
    squared = base.squared_norms(target).double() + 2 * scaling * crossed + scaling**2 * added
    return magnitude.double() / squared.clamp_min(0.0).sqrt()
