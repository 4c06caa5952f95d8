import platform
from itertools import product

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.kernels.native.compiled import INSTRUCTION_SETS, InstructionSet
from server.model import packed_linear
from server.model.native.bindings import KernelsMissing, load_kernels
from server.model.native.linear import NativeLayout, NativeLinear
from server.model.onednn_linear import OneDnnLayout, filled_up
from server.model.packed_linear import Layout, PackedLinear, pack_linear, pack_linears

ONEDNN = (OneDnnLayout(),)
needs_packing = pytest.mark.skipif(
    not OneDnnLayout.takes(torch.float32), reason="this build of torch cannot pack"
)


def native(dtype: torch.dtype, *among: InstructionSet) -> NativeLayout:
    try:
        return NativeLayout(load_kernels(dtype, among or INSTRUCTION_SETS))
    except KernelsMissing as missing:
        pytest.skip(str(missing))


def layout_of(name: str, dtype: torch.dtype) -> Layout:
    if name in INSTRUCTION_SETS:
        return native(dtype, name)
    if not OneDnnLayout.takes(dtype):
        pytest.skip("this machine does not pack the dtype")
    return OneDnnLayout()


def linear(num_in: int, num_out: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(num_in * num_out)
    return nn.Linear(num_in, num_out, bias=bias, dtype=dtype).requires_grad_(False)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (7, 5), (1, 1), (96, 301)])
@pytest.mark.parametrize("shape", [(1,), (4,), (1, 33), (2, 3)])
def test_packed_linear_is_the_same_function(
    num_in: int, num_out: int, shape: tuple[int, ...], bias: bool
) -> None:
    original = linear(num_in, num_out, bias=bias)
    packed = pack_linear(original, ONEDNN)
    assert packed is not None
    x = torch.randn(*shape, num_in, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed(x), original(x), rtol=1e-5, atol=1e-5)


@needs_packing
def test_conv1d_of_gpt2_is_packed_transposed() -> None:
    torch.manual_seed(0)
    original = Conv1D(48, 32).requires_grad_(False)
    original.bias.normal_()
    packed = pack_linear(original, ONEDNN)
    assert packed is not None
    assert (packed.in_features, packed.out_features) == (32, 48)
    x = torch.randn(3, 32)
    torch.testing.assert_close(packed(x), original(x), rtol=1e-5, atol=1e-5)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("name", "dtype"), list(product(["onednn", *INSTRUCTION_SETS], [torch.float32, torch.bfloat16]))
)
@pytest.mark.parametrize(("num_in", "num_out"), [(8, 5), (64, 96), (300, 1000)])
def test_packed_weight_can_be_read_back_and_multiplied_without_its_bias(
    num_in: int, num_out: int, name: str, dtype: torch.dtype, bias: bool
) -> None:
    original = linear(num_in, num_out, bias=bias, dtype=dtype)
    packed = pack_linear(original, [layout_of(name, dtype)])
    assert packed is not None
    assert packed.dtype is dtype
    assert torch.equal(packed.dense(), original.weight)
    assert (packed.bias is None) == (not bias)
    x = torch.randn(4, num_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(packed.product(x), x @ original.weight.t(), rtol=2e-2, atol=2e-2)


@needs_packing
def test_no_rows_give_no_rows() -> None:
    packed = pack_linear(linear(8, 4), ONEDNN)
    assert packed is not None
    assert packed(torch.empty(1, 0, 8)).shape == (1, 0, 4)


@needs_packing
@pytest.mark.parametrize("num_in", [64, 896])
def test_float32_row_does_not_depend_on_the_number_of_rows(num_in: int) -> None:
    packed = pack_linear(linear(num_in, 128), ONEDNN)
    assert packed is not None
    x = torch.randn(70, num_in, generator=torch.Generator().manual_seed(2))
    whole = packed(x)
    for rows in (1, 2, 3, 8, 17):
        assert torch.equal(packed(x[:rows]), whole[:rows])


class Tied(nn.Module):
    """An embedding whose matrix is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(ids)))


@needs_packing
def test_whole_model_is_packed_and_tied_weights_stay_where_they_are_looked_up() -> None:
    torch.manual_seed(0)
    model, ids, fractions = Tied().requires_grad_(False), torch.arange(30), list[float]()
    before = model(ids)
    assert pack_linears(model, ONEDNN, fractions.append) == 2
    torch.testing.assert_close(model(ids), before, rtol=1e-5, atol=1e-5)
    assert isinstance(model.head, PackedLinear)
    assert [name for name, _ in model.named_parameters()] == [
        "embed.weight",
        "inner.1.weight",
        "inner.1.bias",
    ]
    assert fractions == [0.5, 1.0]


@needs_packing
def test_layer_that_fails_its_comparison_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "agrees", lambda *seen: False)
    model = nn.Sequential(linear(8, 8))
    assert pack_linears(model, ONEDNN, lambda fraction: None) == 0
    assert type(model[0]) is nn.Linear


def test_layer_that_cannot_be_packed_stays_as_it_was() -> None:
    model = nn.Sequential(linear(8, 8, dtype=torch.float64))
    assert pack_linears(model, ONEDNN, lambda fraction: None) == 0
    assert type(model[0]) is nn.Linear


def test_only_dtypes_with_packed_products_are_packed() -> None:
    assert not OneDnnLayout.takes(torch.float64)
    assert not OneDnnLayout.takes(torch.int8)


def test_bfloat16_is_packed_by_onednn_on_x86_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    packs = OneDnnLayout.takes(torch.float32)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert OneDnnLayout.takes(torch.float32) == packs
    assert not OneDnnLayout.takes(torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("num_in", "num_out"), [(2, 1), (62, 31), (64, 32), (64, 33), (100, 300), (4864, 48), (64, 1000)]
)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 11, 12, 13, 24, 35, 100])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float32, 2**-23)])
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_native_products_are_those_of_exact_numbers_rounded_once(
    instructions: InstructionSet,
    num_rows: int,
    num_in: int,
    num_out: int,
    bias: bool,
    dtype: torch.dtype,
    rounding: float,
) -> None:
    layout, original = native(dtype, instructions), linear(num_in, num_out, bias=bias, dtype=dtype)
    packed = pack_linear(original, [layout])
    assert isinstance(packed, NativeLinear)
    x = torch.randn(num_rows, num_in, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = x.double() @ original.weight.double().t()
    size = x.double().abs() @ original.weight.double().abs().t()
    if bias:
        exact += original.bias.double()
    error = (packed(x).double() - exact).abs()
    assert bool((error <= exact.abs() * rounding + size * 2**-20).all())


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_native_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(
    instructions: InstructionSet, num_threads: int, dtype: torch.dtype
) -> None:
    packed = pack_linear(linear(896, 200, dtype=dtype), [native(dtype, instructions)])
    assert isinstance(packed, NativeLinear)
    x = torch.randn(150, 896, generator=torch.Generator().manual_seed(4)).to(dtype)
    whole, before = packed(x), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for start in (0, 5, 149):
            for count in (1, 2, 5, 11, 12, 13, 16, 36, 100):
                assert torch.equal(packed(x[start : start + count]), whole[start : start + count])
    finally:
        torch.set_num_threads(before)


def test_native_product_takes_rows_that_lie_apart_and_columns_that_do() -> None:
    packed = pack_linear(linear(64, 40, dtype=torch.bfloat16), [native(torch.bfloat16)])
    assert packed is not None
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    for view in (x[:, :64], x[:, 64:], x[::2, 10:74], x.t()[:64, :].t(), x[:, ::2]):
        assert torch.equal(packed(view), packed(view.contiguous()))


def test_native_layout_leaves_to_others_what_it_has_nothing_for() -> None:
    layout = native(torch.bfloat16)
    assert pack_linear(linear(64, 8), [layout]) is None, "float32"
    assert pack_linear(linear(7, 8, dtype=torch.bfloat16), [layout]) is None, "an odd number of inputs"
    fallen = pack_linear(linear(7, 8, dtype=torch.bfloat16), [layout, *ONEDNN])
    assert not isinstance(fallen, NativeLinear)


def test_few_numbers_of_rows_are_computed_and_little_in_vain() -> None:
    computed = {rows: filled_up(rows) for rows in range(1, 4097)}
    assert len(set(computed.values())) <= 80
    assert all(
        rows <= filled <= max(rows, min(rows + 15, 512), 1.25 * rows) for rows, filled in computed.items()
    )
    assert all(computed[rows] == rows for rows in range(1, 17)), "decoding pays for every row"
