"""What a predicted LoRA is compared by with the task's own: the reconstruction losses, by name.

Each takes predicted and known factors of the layers of one shape, A [K, L, r, in] and B [K, L, out, r], and
gives one number a task, [K].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lofa_core.normalisation import TargetStatistics

Pair = tuple[Tensor, Tensor]


def factors(predicted: Pair, known: Pair, statistics: TargetStatistics | None) -> Tensor:
    """L1 on A and on B (eq. 6), in units of the training set's spread where the network predicts in them."""
    if statistics is not None:
        index = torch.arange(predicted[0].shape[1], device=predicted[0].device)
        predicted, known = statistics.normalise(*predicted, index), statistics.normalise(*known, index)
    return sum((f - k).abs().mean(dim=(1, 2, 3)) for f, k in zip(predicted, known, strict=True))


def delta(predicted: Pair, known: Pair, statistics: TargetStatistics | None) -> Tensor:
    """L1 on dW = B A, as in the published configuration."""
    return (_delta(predicted) - _delta(known)).abs().mean(dim=(1, 2, 3))


def delta_cosine(predicted: Pair, known: Pair, statistics: TargetStatistics | None) -> Tensor:
    """1 - cosine of dW, averaged over layers: the direction alone."""
    flat = (_delta(predicted).flatten(2), _delta(known).flatten(2))
    return 1.0 - torch.cosine_similarity(*flat, dim=-1).mean(1)


def spectral(predicted: Pair, known: Pair, statistics: TargetStatistics | None) -> Tensor:
    """L1 on the singular values of dW, averaged over layers: its strengths alone."""
    return (_singular_values(predicted) - _singular_values(known)).abs().mean(dim=(1, 2))


def canonical(predicted: Pair, known: Pair, statistics: TargetStatistics | None) -> Tensor:
    """L1 on the factors, the known ones first turned into the predicted ones' basis.

    B A = (B Q) (Q^T A) for every rotation Q: only what no rotation removes is counted (orthogonal Procrustes;
    Q is taken as constant).
    """
    (A, B), (known_A, known_B) = predicted, known
    with torch.no_grad():
        left, _, right = torch.linalg.svd(known_B.mT @ B + known_A @ A.mT)
        turn = left @ right
    return (A - turn.mT @ known_A).abs().mean(dim=(1, 2, 3)) + (B - known_B @ turn).abs().mean(dim=(1, 2, 3))


RECONSTRUCTION: dict[str, Callable[[Pair, Pair, TargetStatistics | None], Tensor]] = {
    function.__name__: function for function in (factors, delta, delta_cosine, spectral, canonical)
}


def _delta(pair: Pair) -> Tensor:
    A, B = pair
    return B @ A


def _singular_values(pair: Pair) -> Tensor:
    """[K, L, r], from the r x r product of the triangular factors of B and of A^T."""
    A, B = pair
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)
