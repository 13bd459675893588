"""Memory that is short: how to tell, and what to say."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What tells a plain RuntimeError on the CPU from others: the name of PyTorch's allocator, and what oneDNN
# says when it gets no memory.
_WORDS = ("DefaultCPUAllocator", "could not create a primitive", "could not create a memory object",
          "could not execute a primitive")  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS))


def at_a_time(layers: int) -> str:
    """`4 layers at a time`."""
    return "one layer at a time" if layers == 1 else f"{layers} layers at a time"


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
