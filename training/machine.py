"""What measurements need of the machine they are made on."""

import os
import sys
import time
from collections.abc import Callable

import psutil
import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, to the end of what it has started on the device."""
    _finish(device)
    started = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - started


def cores() -> int:
    """How many processor cores this process may use."""
    if sys.platform == "linux":  # fewer than there are, in a container or under taskset
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's instruction set and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what PyTorch held there at most, elsewhere what the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
