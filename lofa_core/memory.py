"""Memory that is short: how to tell, and what to say."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    # On the CPU PyTorch raises a plain RuntimeError, which only its allocator's name tells from others.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def memory_for(what: str, device: torch.device | str) -> Iterator[None]:
    """MemoryError that says what to do, in place of whatever is raised where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(
            f"There is not enough memory on {device} {what}. Close other programs, or use another device or "
            "bfloat16."
        ) from error
