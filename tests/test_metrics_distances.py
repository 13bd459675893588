"""Distances whose values are known: between Gaussians, directions, and within a set."""

import numpy as np
import pytest

from lofa_core.metrics.distances import cosine, frechet_distance, mean_pairwise


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def by_covariances(a, b, ddof=1):
    A, B = np.cov(a.T, ddof=ddof), np.cov(b.T, ddof=ddof)
    inner = root(root(A) @ B @ root(A))  # the symmetric form, by eigenvectors of symmetric matrices alone
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2.0 * inner)


def test_the_frechet_distance_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), 0.5 + 2.0 * rng.normal(size=(90, 6))
    found = frechet_distance(a, b)
    assert found == pytest.approx(by_covariances(a, b), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(found, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a + 3.0) == pytest.approx(6 * 9.0)
    few = slice(0, 12)
    assert frechet_distance(a[few], b[few], ddof=0) == pytest.approx(
        by_covariances(a[few], b[few], 0), rel=1e-6
    )
    assert frechet_distance(a[few], b[few]) != pytest.approx(by_covariances(a[few], b[few], 0), rel=1e-3)


def test_the_frechet_distance_of_scaled_features_is_known():
    """Uncorrelated features of deviations s and t, the same means: the sum of (s - t)^2."""
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float)  # uncorrelated, of variance 1
    s, t = np.array([1.0, 2.0, 3.0]), np.array([4.0, 2.0, 0.0])
    assert frechet_distance(signs * s, signs * t, ddof=0) == pytest.approx(9.0 + 0.0 + 9.0)


def test_the_frechet_distance_takes_fewer_videos_than_features():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 12)), rng.normal(size=(7, 12))
    assert frechet_distance(a, b) == pytest.approx(by_covariances(a, b), rel=1e-6)


@pytest.mark.parametrize("a, b", [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5,)), ((5, 3), (1, 3))])
def test_a_frechet_distance_of_too_little_is_refused(a, b):
    with pytest.raises(ValueError, match="N and M 2 or more"):
        frechet_distance(np.zeros(a), np.zeros(b))


def test_cosines_by_row():
    a = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert cosine(a, np.array([[2.0, 0.0], [-3.0, -4.0], [1.0, 0.0]])) == pytest.approx([1.0, -1.0, 0.0])
    assert cosine(a, np.array([[0.0, 5.0]])) == pytest.approx([0.0, 0.8, 0.0])


def test_the_mean_over_all_pairs():
    assert mean_pairwise([0.0, 1.0, 5.0], lambda a, b: abs(a - b)) == pytest.approx((1 + 5 + 4) / 3)
    with pytest.raises(ValueError, match="within 1 item"):
        mean_pairwise([0.0], lambda a, b: 0.0)
