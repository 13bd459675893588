"""Numbers that come from strangers."""

import torch
from torch import Tensor


def check_finite(values: Tensor, what: str) -> None:
    """Raises ValueError naming `what` where floating-point values hold NaN or infinity."""
    if not values.is_floating_point() or not values.numel():
        return
    # One pass without a copy, and NaN comes through; PyTorch compares no 8-bit floats.
    lowest, highest = (values.float() if values.dtype.itemsize == 1 else values).aminmax()
    if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
        raise ValueError(f"{what} holds values that are not numbers (NaN or infinite). Get or make it again.")
