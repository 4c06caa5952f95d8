"""What fewer bits cost: nothing where there are no fewer, little where there are."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import quality
from server.model.native.bindings import KernelsMissing, load_kernels


@pytest.mark.parametrize(
    ("flags", "divergence", "agreement"),
    [
        (("--quantization", "none"), 0.0, 1.0),
        (("--quantization", "int8"), 0.01, 0.97),
        (("--quantization", "int4"), 0.5, 0.8),
        (("--quantization", "none", "--kv-cache-dtype", "int8"), 0.01, 0.97),
    ],
)
def test_distance_of_the_embedded_model(
    flags: tuple[str, ...], divergence: float, agreement: float, tmp_path: Path
) -> None:
    try:
        load_kernels(torch.float32)
    except KernelsMissing as missing:
        pytest.skip(str(missing))
    written = tmp_path / "quality.json"

    assert quality.main([*flags, "--passages", "20", "--dtype", "float32", "--json", str(written)]) == 0

    found = json.loads(written.read_text())
    assert found["tokens"] > 200
    assert found["loss"] < 2.0, "a model that does not know its answers: no test"
    if divergence:
        assert 0.0 < found["mean_divergence"] < divergence
        assert found["same_next_token"] > agreement
    else:
        assert found["mean_divergence"] == 0.0
        assert found["same_next_token"] == 1.0
