from pathlib import Path

import torch

from server.model.memory import CPU_LIMIT_BYTES, available_cpu_bytes, default_kv_bytes

GIB = 1 << 30


def machine(folder: Path, *, available_kib: int | None = None, **cgroup: str) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup with the given contents."""
    proc, group = folder / "proc", folder / "cgroup"
    proc.mkdir()
    (group / "memory").mkdir(parents=True)
    if available_kib is not None:
        (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available_kib} kB\n")
    for name, text in cgroup.items():
        (group / name.replace("__", "/").replace("-", ".")).write_text(text)
    return proc, group


def test_without_a_container_the_kernels_word_counts(tmp_path: Path) -> None:
    assert available_cpu_bytes(*machine(tmp_path, available_kib=1000)) == 1000 * 1024


def test_container_limit_counts_where_it_leaves_less(tmp_path: Path) -> None:
    files = {"memory-max": f"{3 * GIB}\n", "memory-current": f"{GIB}\n"}
    assert available_cpu_bytes(*machine(tmp_path, available_kib=64 << 20, **files)) == 2 * GIB


def test_unlimited_container_has_no_say(tmp_path: Path) -> None:
    files = {"memory-max": "max\n", "memory-current": f"{GIB}\n"}
    assert available_cpu_bytes(*machine(tmp_path, available_kib=1000, **files)) == 1000 * 1024


def test_first_version_of_cgroups_is_read_too(tmp_path: Path) -> None:
    files = {"memory__memory-limit_in_bytes": str(5 * GIB), "memory__memory-usage_in_bytes": str(GIB)}
    assert available_cpu_bytes(*machine(tmp_path, available_kib=64 << 20, **files)) == 4 * GIB


def test_container_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"memory-max": "100", "memory-current": "200"}
    assert available_cpu_bytes(*machine(tmp_path, available_kib=1000, **files)) == 0


def test_machine_that_tells_nothing_gets_the_largest_default(tmp_path: Path) -> None:
    assert available_cpu_bytes(*machine(tmp_path)) // 4 == CPU_LIMIT_BYTES


def test_default_on_cpu_is_bounded() -> None:
    assert 0 < default_kv_bytes(torch.device("cpu")) <= CPU_LIMIT_BYTES
