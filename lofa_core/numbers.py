"""Numbers that come from strangers."""

import torch
from torch import Tensor


def is_finite(values: Tensor) -> bool:
    """Whether no NaN and no infinity is among them, in one pass without a copy."""
    if not values.is_floating_point() or not values.numel():
        return True
    # NaN comes through aminmax; PyTorch compares no 8-bit floats.
    lowest, highest = (values.float() if values.dtype.itemsize == 1 else values).aminmax()
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def check_finite(values: Tensor, what: str) -> None:
    """Raises ValueError naming `what` where they are not all finite."""
    if not is_finite(values):
        raise ValueError(
            f"{what} holds numbers that are not finite: it is damaged, or its dtype is too narrow for it. "
            "Get or make it again."
        )
