"""Target statistics against explicit numpy, and their inverse."""

import numpy as np
import pytest
import torch
from tiny import generator

from lofa_core.normalisation import TargetStatistics

K, L, R, OUT, IN = 5, 3, 2, 4, 6


def loras(seed=0, count=K):
    draw = generator(seed)
    scale = torch.tensor([0.1, 1.0, 30.0]).view(1, L, 1, 1)  # layers of very different size
    A = 0.5 + scale * torch.randn(count, L, R, IN, generator=draw)
    return A, 0.01 * scale * torch.randn(count, L, OUT, R, generator=draw) - 0.2


def fitted(A, B):
    statistics = TargetStatistics(L, R, OUT, IN)
    statistics.fit(A, B)
    return statistics


def test_fit_takes_mean_and_spread_of_every_layer():
    A, B = loras()
    found = fitted(A, B)
    a, b = A.double().numpy(), B.double().numpy()
    assert np.allclose(found.A_mean, a.mean(0), atol=1e-5) and np.allclose(found.B_mean, b.mean(0), atol=1e-5)
    for layer in range(L):
        # one number a layer: over tasks, ranks and columns
        a_scale = np.sqrt(np.mean([(a[k, layer] - a[:, layer].mean(0)) ** 2 for k in range(K)]))
        b_scale = np.sqrt(np.mean([(b[k, layer] - b[:, layer].mean(0)) ** 2 for k in range(K)]))
        mean = b[:, layer].mean(0) @ a[:, layer].mean(0)
        spread = np.sqrt(np.mean([(b[k, layer] @ a[k, layer] - mean) ** 2 for k in range(K)]))
        assert found.A_scale[layer].item() == pytest.approx(a_scale, rel=1e-4)
        assert found.B_scale[layer].item() == pytest.approx(b_scale, rel=1e-4)
        assert found.delta_log_deviation[layer].exp().item() == pytest.approx(spread, rel=1e-4)


def test_normalised_targets_have_mean_zero_and_size_one_in_every_layer():
    A, B = loras(count=9)
    for values in fitted(A, B).normalise(A, B, torch.arange(L)):
        assert values.mean(0).abs().max() < 1e-4
        assert torch.allclose(values.pow(2).mean(dim=(0, 2, 3)), torch.ones(L), atol=1e-4)


def test_denormalise_undoes_normalise_for_any_choice_of_layers():
    A, B = loras()
    statistics = fitted(*loras(1))
    index = torch.tensor([2, 0])
    a, b = statistics.normalise(A[:, index], B[:, index], index)
    assert not torch.allclose(a, A[:, index])
    for found, wanted in zip(statistics.denormalise(a, b, index), (A[:, index], B[:, index]), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_zero_offsets_are_the_mean_lora():
    statistics = fitted(*loras())
    index = torch.tensor([1, 2])
    A, B = statistics.denormalise(torch.zeros(1, 2, R, IN), torch.zeros(1, 2, OUT, R), index)
    assert torch.equal(A[0], statistics.A_mean[index]) and torch.equal(B[0], statistics.B_mean[index])


def test_loras_that_do_not_differ_leave_nothing_infinite():
    A, B = (values.expand(4, -1, -1, -1) for values in loras(count=1))
    statistics = fitted(A, B)
    assert all(torch.isfinite(value).all() for value in statistics.buffers())
    assert all(torch.isfinite(v).all() for v in statistics.normalise(A, B, torch.arange(L)))


@pytest.mark.parametrize("wrong", ["layers", "rank", "axes"])
def test_shapes_that_are_not_a_set_of_loras_are_refused(wrong):
    A, B = loras()
    B = {"layers": B[:, :2], "rank": B[..., :1], "axes": B[0]}[wrong]
    with pytest.raises(ValueError, match=r"expected A \[K, L, r, in\] and B \[K, L, out, r\]"):
        TargetStatistics(L, R, OUT, IN).fit(A, B)
