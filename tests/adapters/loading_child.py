"""Loads adapter folders under limits, and tells what became of each and what it took. A process of its own.

python -m tests.adapters.loading_child FOLDER ...     one line of JSON for each
"""

import json
import re
import resource
import sys
import time
from pathlib import Path

import torch

from adapters.errors import AdapterError
from adapters.weights import load_weights
from tests.adapters.making import small_targets

CPU_S = 60
ROOM_BYTES = 512 << 20


def status(field: str) -> int:
    """Bytes, out of /proc."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    address_space = status("VmSize") + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    for folder in sys.argv[1:]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        resident, begun = status("VmRSS"), time.process_time()
        try:
            load_weights(Path(folder), small_targets(), torch.float32, 1 << 20)
            error = None
        except AdapterError as refusal:
            error = refusal.message
        taken = {
            "error": error,
            "peak_bytes": status("VmHWM") - resident,
            "cpu_s": time.process_time() - begun,
        }
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main()
