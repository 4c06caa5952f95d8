"""Weights of few bits: the products that their definition says, the same bits in any company."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.kernels.native.compiled import INSTRUCTION_SETS
from server.model.cpu_kernels import Quantization, pick_kernels
from server.model.errors import ModelNotSupported
from server.model.native.bindings import KernelsMissing, NativeKernels, load_kernels
from server.model.native.linear import QuantizedLayout, QuantizedLinear
from server.model.packed_linear import pack_linear

DTYPES = [torch.float32, torch.bfloat16]
GROUP = 128
KernelsFor = Callable[[torch.dtype], NativeKernels]


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels_for(request: pytest.FixtureRequest) -> KernelsFor:
    def load(dtype: torch.dtype) -> NativeKernels:
        try:
            return load_kernels(dtype, (request.param,), beside_amx=True)
        except KernelsMissing as missing:
            pytest.skip(str(missing))

    return load


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, k] as whole numbers in float64, and the scale of each row."""
    scale = values.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, values / scale, 0.0).round(), scale


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By the definition, in float64, over weights that are what their bits stand for."""
    total = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for part, w in zip(x.double().split(GROUP, -1), weight.double().split(GROUP, -1), strict=True):
        p, scale = quantized(part)
        total += scale * (p @ w.t())
    return total if bias is None else total + bias.double()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_in", "num_out"), [(4, 5), (7, 33), (128, 32), (130, 64), (896, 301)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-5)])
def test_products_are_what_the_definition_says(
    kernels_for: KernelsFor,
    dtype: torch.dtype,
    rounding: float,
    num_in: int,
    num_out: int,
    bias: bool,
    bits: int,
) -> None:
    kernels = kernels_for(dtype)
    weight = drawn(num_out, num_in, dtype=dtype, seed=2)
    offset = drawn(num_out, dtype=dtype, seed=3) if bias else None
    layer = QuantizedLinear(kernels, weight, offset, bits)
    for num_rows in (1, 2, 5, 6, 7, 13, 16, 17, 40):
        x = drawn(num_rows, num_in, dtype=dtype, seed=num_rows)

        right = expected(x, layer.dense(), offset)

        # An input half way between two numbers may go to either.
        step = float(weight.abs().max() * x.abs().max()) / 127
        torch.testing.assert_close(
            layer(x).double(), right, rtol=rounding, atol=rounding * float(right.abs().max()) + 0.02 * step
        )


@pytest.mark.parametrize(("bits", "lost"), [(8, 0.03), (4, 0.12)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_are_close_to_those_of_the_weights_as_they_are(
    kernels_for: KernelsFor, dtype: torch.dtype, bits: int, lost: float
) -> None:
    kernels = kernels_for(dtype)
    x, weight = drawn(50, 896, dtype=dtype, seed=1), drawn(300, 896, dtype=dtype, seed=2)
    x[:, 5] *= 50  # an input that is far larger than the others spoils its own group alone

    got, right = QuantizedLinear(kernels, weight, None, bits)(x).float(), F.linear(x, weight).float()

    assert (got - right).square().mean().sqrt() < lost * right.square().mean().sqrt()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    kernels_for: KernelsFor, dtype: torch.dtype, bits: int
) -> None:
    kernels = kernels_for(dtype)
    x = drawn(23, 300, dtype=dtype, seed=1)
    layer = QuantizedLinear(kernels, drawn(77, 300, dtype=dtype, seed=2), drawn(77, dtype=dtype), bits)
    alone = torch.cat([layer(x[row : row + 1]) for row in range(len(x))])
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        together = layer(x)
        torch.set_num_threads(threads)
        assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_can_be_read_back_to_half_a_step(kernels_for: KernelsFor, dtype: torch.dtype) -> None:
    weight = drawn(45, 131, dtype=dtype)
    layer = QuantizedLinear(kernels_for(dtype), weight, None, 8)

    step = weight.float().abs().amax(-1, keepdim=True) / 127

    assert (
        (layer.dense().float() - weight.float()).abs() <= 0.51 * step + 2**-8 * weight.float().abs()
    ).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_rows_that_are_no_numbers(
    kernels_for: KernelsFor, dtype: torch.dtype, bits: int
) -> None:
    layer = QuantizedLinear(kernels_for(dtype), drawn(40, 200, dtype=dtype), None, bits)
    x = drawn(6, 200, dtype=dtype)
    x[1], x[2, 150], x[4, 3], x[5, 199] = 0.0, torch.nan, torch.inf, -torch.inf
    right = layer(x[[0, 3]])

    got = layer(x)

    assert got[1].eq(0.0).all()
    assert got[[2, 4, 5]].isnan().all()
    assert torch.equal(got[[0, 3]], right)


@pytest.mark.parametrize("bits", [8, 4])
def test_outputs_of_zeros_and_no_rows(kernels_for: KernelsFor, bits: int) -> None:
    kernels = kernels_for(torch.float32)
    weight = drawn(40, 64, dtype=torch.float32)
    weight[7] = 0.0
    layer = QuantizedLinear(kernels, weight, None, bits)

    assert layer(drawn(3, 64, dtype=torch.float32))[:, 7].eq(0.0).all()
    assert layer(torch.empty(0, 64)).shape == (0, 40)


@pytest.mark.parametrize("bits", [8, 4])
def test_layout_is_taken_for_what_it_is(kernels_for: KernelsFor, bits: int) -> None:
    """It is far from exact, and must not be refused for that; nor be used for a dtype of others."""
    layout = QuantizedLayout(kernels_for(torch.float32), bits)
    torch.manual_seed(0)
    packed = pack_linear(nn.Linear(896, 64), [layout])

    assert isinstance(packed, QuantizedLinear)
    assert packed.num_bytes < 896 * 64 * (bits + 1) / 8
    assert pack_linear(nn.Linear(8, 8, dtype=torch.bfloat16), [layout]) is None


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_only_our_own_kernels_have_them(quantization: Quantization) -> None:
    with pytest.raises(ModelNotSupported, match=f"{quantization}.*--cpu-kernels torch"):
        pick_kernels("torch", torch.float32, quantization)
    with pytest.raises(ModelNotSupported, match="float16"):
        pick_kernels("auto", torch.float16, quantization)
