"""What LoFA is compared with must be right: each baseline against a slow reference."""

import numpy as np
import pytest
import torch
from tiny import generator

from training.baselines.simple import mean_lora, nearest_lora, ridge_lora
from training.factors import Factors

SIZES = (3, 2, 2)
STRENGTHS = (0.01, 1.0, 30.0)


def dataset(noise, tasks=9, seed=0):
    """(LoRAs, known indices, wanted indices, wanted LoRAs): sums of one term a factor value, plus noise."""
    draw = generator(seed)
    rows = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    order = torch.randperm(len(rows), generator=draw)
    known, wanted = rows[order[:tasks]], rows[order[tasks:]]
    terms = [torch.randn(size, 40, generator=draw) for size in SIZES]

    def exact(indices):
        return 0.3 + sum(term[indices[:, i]] for i, term in enumerate(terms))

    values = exact(known) + noise * torch.randn(len(known), 40, generator=draw)
    return split(values), known, wanted, split(exact(wanted))


def split(values):
    return Factors((values[:, :24].view(-1, 2, 3, 4),), (values[:, 24:].reshape(-1, 2, 8, 1),))


def flat(loras):
    return torch.cat([loras.A[0].flatten(1), loras.B[0].flatten(1)], 1).double().numpy()


def one_hot(rows):
    return np.array(
        [[float(row[i] == v) for i, size in enumerate(SIZES) for v in range(size)] for row in rows.tolist()]
    )


def fit(X, Y, strength):
    """Ridge with an unpenalised constant, as least squares with extra rows; returns a predictor."""
    x, y = X.mean(0), Y.mean(0)
    rows = np.vstack([X - x, np.sqrt(strength) * np.eye(X.shape[1])])
    weights = np.linalg.lstsq(rows, np.vstack([Y - y, np.zeros((X.shape[1], Y.shape[1]))]), rcond=None)[0]
    return lambda new: (new - x) @ weights + y


def left_out_error(X, Y, strength):
    """The mean squared error at each task of a fit that never saw it."""
    errors = []
    for i in range(len(X)):
        others = [j for j in range(len(X)) if j != i]
        errors.append((fit(X[others], Y[others], strength)(X[i]) - Y[i]) ** 2)
    return np.mean(errors)


@pytest.mark.parametrize("noise", [0.01, 1.0, 6.0])
def test_ridge_takes_the_strength_that_really_leaving_one_out_finds_best(noise):
    loras, known, wanted, _ = dataset(noise)
    X, Y = one_hot(known), flat(loras)
    errors = [left_out_error(X, Y, strength) for strength in STRENGTHS]
    best = STRENGTHS[int(np.argmin(errors))]
    assert best == {0.01: 0.01, 1.0: 1.0, 6.0: 30.0}[noise]  # each of them is best somewhere here
    found = flat(ridge_lora(loras, known, wanted, STRENGTHS))
    assert np.allclose(found, fit(X, Y, best)(one_hot(wanted)), atol=1e-3)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_its_leave_one_out_errors_are_exact_enough_to_choose_among_near_strengths(seed):
    loras, known, wanted, _ = dataset(1.0, tasks=7, seed=seed)
    X, Y, near = one_hot(known), flat(loras), np.geomspace(0.05, 20.0, 60).tolist()
    best = near[int(np.argmin([left_out_error(X, Y, strength) for strength in near]))]
    assert near[0] < best < near[-1]
    found = flat(ridge_lora(loras, known, wanted, near))
    assert np.allclose(found, fit(X, Y, best)(one_hot(wanted)), atol=1e-3)


def test_ridge_extends_sums_of_factors_to_combinations_never_seen():
    loras, known, wanted, truth = dataset(0.0)
    found = ridge_lora(loras, known, wanted, (1e-3,))
    for ours, true in zip((*found.A, *found.B), (*truth.A, *truth.B), strict=True):
        assert ours.shape == true.shape and torch.allclose(ours, true, atol=0.05)


def test_ridge_takes_a_factor_value_that_only_the_wanted_tasks_have():
    loras, known, wanted, _ = dataset(0.1)
    new = torch.cat([wanted, torch.tensor([[5, 0, 0]])])
    found = ridge_lora(loras, known, new)
    assert len(found) == len(new) and torch.isfinite(found.flat()).all()


def test_the_mean_lora_is_one_and_the_same_for_all():
    loras, *_ = dataset(1.0)
    found = mean_lora(loras, 5)
    assert found.A[0].shape == (5, 2, 3, 4) and found.B[0].shape == (5, 2, 8, 1)
    for row in range(5):
        assert torch.allclose(found.A[0][row], sum(loras.A[0]) / 9, atol=1e-6)
        assert torch.allclose(found.B[0][row], sum(loras.B[0]) / 9, atol=1e-6)


def test_the_nearest_lora_agrees_in_most_factors():
    loras, known, wanted, _ = dataset(1.0)
    wanted = torch.cat([wanted, known[4:5]])
    found = nearest_lora(loras, known, wanted)
    (found_A,), (found_B,), (A,), (B,) = found.A, found.B, loras.A, loras.B
    for row, factors in enumerate(wanted.tolist()):
        agreement = [sum(a == b for a, b in zip(factors, other, strict=True)) for other in known.tolist()]
        used = [i for i in range(9) if torch.equal(found_A[row], A[i]) and torch.equal(found_B[row], B[i])]
        assert len(used) == 1 and agreement[used[0]] == max(agreement)
    assert torch.equal(found_A[-1], A[4])
