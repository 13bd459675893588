"""Response maps R (section 3.2 of LoFA): which entries of a weight a LoRA changes noticeably."""

from collections.abc import Mapping, Sequence

import numpy
import torch
from torch import Tensor

THRESHOLD = 0.02


def response_map(W: Tensor, dW: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """R = 1 where |dW / W| > threshold (section 3.2). W, dW [..., out, in] -> bool [..., out, in].

    Written as |dW| > threshold |W|: an entry with W = 0 responds to any change, one with dW = 0 never does.
    """
    _same_shape(W, dW)
    return dW.float().abs() > threshold * W.float().abs()


def response_magnitude(W: Tensor, dW: Tensor) -> Tensor:
    """|dW / W|, float32 [..., out, in]: infinite where only W is 0, and 0 wherever dW is 0."""
    _same_shape(W, dW)
    change = dW.float().abs()
    return torch.where(change == 0, change, change / W.float().abs())


def statistics(responses: Mapping[str, Tensor]) -> dict[str, float]:
    """Fraction of entries that respond (of probabilities: their mean), for each layer's R [out, in]."""
    return {name: response.double().mean().item() for name, response in responses.items()}


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors of one shape, taken as vectors; 0 when one of them is all zeros."""
    _same_shape(a, b)
    a, b = a.double().flatten(), b.double().flatten()
    norms = (a.norm() * b.norm()).item()
    return (a @ b).item() / norms if norms else 0.0


def centred_cosine(a: Tensor, b: Tensor, mean: Tensor) -> float:
    """Cosine of a - mean and b - mean.

    With the training tasks' mean map as `mean` it leaves out what all tasks share: the mean map itself, which
    the plain cosine rates highly, scores 0.
    """
    _same_shape(a, mean)
    return cosine(a.double() - mean.double(), b.double() - mean.double())


def between_tasks_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the rows of a and b [M, n], M tasks, each of the two less its own mean over the tasks.

    What all tasks share is left out, and nothing estimated is taken off both: sets that agree on nothing else
    score 0 on average. `centred_cosine` with the mean of K training maps has that mean's noise on both sides,
    which with few maps scores well above 0.
    """
    _same_shape(a, b)
    a, b = a - a.mean(0), b - b.mean(0)
    return sum(cosine(*pair) for pair in zip(a, b, strict=True)) / len(a)


def pack(response: Tensor) -> Tensor:
    """Bool R of any shape -> uint8 [ceil(entries / 8)], the first of eight entries in the highest bit."""
    if response.dtype != torch.bool:
        raise ValueError(f"only a bool response map can be packed, not {response.dtype}: threshold it first.")
    return torch.from_numpy(numpy.packbits(response.cpu().numpy()))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack`: uint8 [ceil(entries / 8)] -> bool R of `shape`."""
    entries = int(numpy.prod(shape))
    if packed.numel() != (entries + 7) // 8:
        raise ValueError(f"{packed.numel()} packed bytes do not hold a response map of shape {tuple(shape)}.")
    bits = numpy.unpackbits(packed.cpu().numpy(), count=entries)
    return torch.from_numpy(bits).bool().reshape(tuple(shape))


def _same_shape(a: Tensor, b: Tensor) -> None:
    # Broadcasting would turn a transposed or flattened input into a wrong map without a word.
    if a.shape != b.shape:
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ: give two tensors of one shape."
        )
