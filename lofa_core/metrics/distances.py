"""Distances between features, as pure functions."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray, *, ddof: int = 1) -> float:
    """Frechet distance between Gaussians fitted to features [N, d] and [M, d] (Heusel et al. 2017, eq. 6):
    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances over N - ddof and M - ddof.

    ValueError for fewer than two rows, or rows of different widths.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"a Frechet distance of features {list(a.shape)} and {list(b.shape)}: expected [N, d] and [M, d] "
            "with N and M 2 or more."
        )
    roots: list[np.ndarray] = []
    for features in (a, b):
        centred = (features - features.mean(0)) / np.sqrt(len(features) - ddof)
        # R of the covariance R' R: small where there are more rows than features, or fewer.
        roots.append(np.asarray(np.linalg.qr(centred, mode="r")))
    # With A = Ra' Ra and B = Rb' Rb, the trace of the root of A B is the sum of the singular values of
    # Ra Rb': no root of a matrix that is nearly singular, as covariances of few videos are.
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    gap = a.mean(0) - b.mean(0)
    total = gap @ gap + (roots[0] ** 2).sum() + (roots[1] ** 2).sum() - 2.0 * shared
    return float(max(total, 0.0))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines [N] between the rows of [N, d] and of [N, d] or [1, d]; 0 where a row is all zero."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.maximum(lengths, 1e-12)


def mean_pairwise(items: Sequence[Any], distance: Callable[[Any, Any], float]) -> float:
    """Mean of a symmetric distance over all pairs. ValueError for fewer than two items."""
    if len(items) < 2:
        raise ValueError(f"the distance within {len(items)} item: two or more are needed.")
    return float(np.mean([distance(a, b) for a, b in combinations(items, 2)]))
