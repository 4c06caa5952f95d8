import pytest
import torch

from server.engine.kv_cache import KVCache, kv_bytes_per_block, num_kv_blocks
from server.model.attention import LayerSpec
from server.model.errors import MemoryTooSmall
from server.model.native.attention import NativeAttention
from server.model.native.bindings import KernelsMissing, load_kernels
from server.model.torch_attention import TorchAttention


def layer(num_kv_heads: int = 2, key_dim: int = 8, value_dim: int = 8) -> LayerSpec:
    return LayerSpec(num_kv_heads, key_dim, value_dim, None, None)


def test_block_takes_the_bytes_of_all_its_layers() -> None:
    layers = [layer(2, 8, 8), layer(4, 12, 6)]
    assert kv_bytes_per_block(layers, TorchAttention(), 16, torch.bfloat16) == 16 * 2 * (2 * 16 + 4 * 18)


def test_eight_bits_take_a_byte_a_number_and_a_scale_a_head() -> None:
    try:
        kernels = NativeAttention(load_kernels(torch.bfloat16, ("avx2",)), has_bytes=True)
    except KernelsMissing as missing:
        pytest.skip(str(missing))
    layers = [layer(2, 64, 64), layer(4, 48, 32)]

    kv = KVCache(
        layers, kernels, num_blocks=5, block_size=16, dtype=torch.bfloat16, device=torch.device("cpu")
    )

    per_block = kv_bytes_per_block(layers, kernels, 16, torch.bfloat16)
    assert per_block == 16 * (2 * (64 + 64 + 8) + 4 * (48 + 32 + 8))
    assert kv.num_bytes == 5 * per_block == sum(cache.nbytes for cache in (*kv.keys, *kv.values))


def test_tensors_have_each_layers_own_shape_and_the_promised_size() -> None:
    layers = [layer(2, 8, 8), layer(4, 12, 6)]
    kv = KVCache(
        layers, TorchAttention(), num_blocks=5, block_size=4, dtype=torch.float32, device=torch.device("cpu")
    )
    assert [tuple(t.shape) for t in kv.keys] == [(20, 2, 8), (20, 4, 12)]
    assert [tuple(t.shape) for t in kv.values] == [(20, 2, 8), (20, 4, 6)]
    assert kv.num_bytes == sum(t.numel() * t.element_size() for t in (*kv.keys, *kv.values))


def test_clearing_touches_only_the_given_positions() -> None:
    kv = KVCache(
        [layer()],
        TorchAttention(),
        num_blocks=2,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    kv.keys[0].fill_(float("nan"))
    kv.values[0].fill_(float("nan"))
    kv.clear(torch.tensor([1, 6]))
    for cache in (kv.keys[0], kv.values[0]):
        assert cache.isfinite().all(dim=(1, 2)).tolist() == [
            False,
            True,
            False,
            False,
            False,
            False,
            True,
            False,
        ]


def test_budget_buys_whole_blocks() -> None:
    assert num_kv_blocks(1000, 30, 4, max_model_len=100, max_num_seqs=8) == 33


def test_no_more_blocks_than_all_sequences_can_use() -> None:
    assert num_kv_blocks(10**9, 30, 4, max_model_len=101, max_num_seqs=8) == 8 * 26


def test_budget_below_one_sequence_is_refused_with_the_flags_to_change() -> None:
    with pytest.raises(MemoryTooSmall) as caught:
        num_kv_blocks(1000, 30, 4, max_model_len=133, max_num_seqs=8)
    message = str(caught.value)
    assert "--max-model-len to 132" in message
    assert "--kv-cache-memory-bytes" in message
    assert num_kv_blocks(1000, 30, 4, max_model_len=132, max_num_seqs=8) == 33
