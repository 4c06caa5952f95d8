"""Hostile folders are refused, and reading one takes no more memory and time than anybody may take.

In a process of its own, whose memory and processor time are limited by the system: what breaks the limit
ends it, and fails the test, instead of the machine. Processor time and not time, which depends on others.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from adapters.errors import AdapterInvalid
from adapters.weights import load_weights
from tests.adapters.making import small_folder, small_targets
from tests.hostile_folders import BOMBS, MIB

ROOT = Path(__file__).parents[2]
MOST_BYTES = 64 * MIB  # the longest header that is read, as text and as objects; patterns, compiled
MOST_CPU_S = 5.0  # what the patterns of a config may take, five times

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")


@linux_only
def test_no_bomb_takes_more_than_it_may(tmp_path: Path) -> None:
    folders = []
    for number, (name, break_it) in enumerate(BOMBS.items()):
        folders.append(small_folder(tmp_path / f"{number:02d} {name}").path)
        break_it(folders[-1])

    child = subprocess.run(
        [sys.executable, "-m", "tests.adapters.loading_child", *map(str, folders)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    told = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(told) == len(folders), f"ended at {folders[len(told)].name}: {child.stderr[-2000:]}"
    taken = dict(zip(BOMBS, told, strict=True))
    assert [name for name, one in taken.items() if one["error"] is None] == []
    assert {name: one for name, one in taken.items() if one["peak_bytes"] > MOST_BYTES} == {}
    assert {name: one for name, one in taken.items() if one["cpu_s"] > MOST_CPU_S} == {}
    assert all(len(one["error"]) < 1500 and str(tmp_path) not in one["error"] for one in told)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_we_may_not_read_are_refused(name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = small_folder(Path(place) / "adapter")
        (folder.path / name).chmod(0)
        if is_root := os.geteuid() == 0:
            os.seteuid(65534)  # root may read everything: be somebody else, who may come so far
        try:
            with pytest.raises(AdapterInvalid, match="cannot be read"):
                load_weights(folder.path, small_targets(), torch.float32, 1 << 20)
        finally:
            if is_root:
                os.seteuid(0)
