"""How much memory the KV cache may take when the operator does not say.

On CPU the machine is shared with whatever else runs there, so the default is modest: a quarter of what is
left once the model is loaded, and at most 4 GiB. "Left" is the smaller of what the kernel calls available and
what the container's limit leaves. On CUDA the device is ours up to `gpu_memory_utilization`.
"""

from pathlib import Path

import torch

CPU_LIMIT_BYTES = 4 << 30
_CPU_SHARE = 4
_CGROUPS = (  # (limit, usage): version 2, then version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def default_kv_bytes(device: torch.device, *, gpu_memory_utilization: float = 0.9) -> int:
    """The default budget in bytes. Call it after the model is loaded."""
    if device.type == "cuda":
        return _cuda_bytes(device, gpu_memory_utilization)
    return min(CPU_LIMIT_BYTES, available_cpu_bytes() // _CPU_SHARE)


def available_cpu_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take. Without either source (not Linux): 4 budgets' worth, i.e. no
    opinion.
    """
    candidates = [_mem_available(proc / "meminfo"), *(_cgroup_left(cgroup, *names) for names in _CGROUPS)]
    known = [candidate for candidate in candidates if candidate is not None]
    return min(known) if known else CPU_LIMIT_BYTES * _CPU_SHARE


def _cuda_bytes(device: torch.device, utilization: float) -> int:
    """What is left below the share of the device that we may use, counting everybody's use of it."""
    torch.cuda.empty_cache()  # memory that loading freed is ours, not in use
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(total * utilization) - (total - free))


def _mem_available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_left(root: Path, limit_name: str, usage_name: str) -> int | None:
    """Limit less usage; None without a limit ("max", or a file that is not there)."""
    limit, usage = _read_int(root / limit_name), _read_int(root / usage_name)
    return None if limit is None or usage is None else max(0, limit - usage)


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
