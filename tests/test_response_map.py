"""The response map's equation against a slow reference, and its packing."""

import math

import pytest
import torch

from lofa_core.response_map import (
    THRESHOLD,
    between_tasks_cosine,
    centred_cosine,
    cosine,
    pack,
    response_magnitude,
    response_map,
    statistics,
    unpack,
)


def reference(W, dW, threshold):
    """Section 3.2 entry by entry: |dW / W| > threshold, a division only where W is not 0."""
    R = torch.zeros(W.shape, dtype=torch.bool)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            w, d = W[i, j].item(), dW[i, j].item()
            R[i, j] = abs(d / w) > threshold if w != 0 else d != 0
    return R


def weights(out=23, in_=31):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out, in_, generator=generator)
    dW = 0.02 * torch.randn(out, in_, generator=generator)
    W[0, :5], dW[0, 2:9], dW[3] = 0, 0, 0  # W = 0 alone, both 0, dW = 0 alone
    return W, dW


@pytest.mark.parametrize("threshold", [THRESHOLD, 0.0, 0.5])
def test_response_map_is_the_papers_equation(threshold):
    W, dW = weights()
    R = response_map(W, dW, threshold)
    assert R.dtype == torch.bool and torch.equal(R, reference(W, dW, threshold))
    assert 0 < R.float().mean() < 1


def test_threshold_is_two_percent_and_a_zero_weight_responds_only_to_a_change():
    W = torch.tensor([[1.0, 1.0, -1.0, 0.0, 0.0]])
    dW = torch.tensor([[0.019, -0.021, 0.021, 1e-30, 0.0]])
    assert response_map(W, dW).tolist() == [[False, True, True, True, False]]


def test_half_precision_inputs_are_compared_in_float32():
    W, dW = (x.bfloat16() for x in weights())
    assert torch.equal(response_map(W, dW), reference(W.float(), dW.float(), THRESHOLD))


def test_magnitude_is_what_the_map_thresholds():
    W, dW = weights()
    magnitude = response_magnitude(W, dW)
    assert torch.equal(magnitude > THRESHOLD, response_map(W, dW))
    assert math.isinf(magnitude[0, 0]) and magnitude[0, 3] == 0 and not magnitude.isnan().any()


def test_a_transposed_weight_is_refused():
    W, dW = weights()
    with pytest.raises(ValueError, match=r"\(23, 31\) and \(31, 23\) differ"):
        response_map(W, dW.T)
    with pytest.raises(ValueError, match="differ"):
        response_magnitude(W, dW[:1])  # would broadcast


def test_statistics_give_the_fraction_of_each_layer():
    R = torch.zeros(4, 8, dtype=torch.bool)
    R[0] = True
    assert statistics({"a": R, "b": ~R, "probabilities": torch.full((2, 2), 0.3)}) == {
        "a": 0.25,
        "b": 0.75,
        "probabilities": pytest.approx(0.3),
    }


def test_cosines():
    generator = torch.Generator().manual_seed(0)
    a, b, mean = torch.rand(3, 5, 7, generator=generator)
    slow = sum(x * y for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    slow /= math.sqrt(sum(x * x for x in a.flatten().tolist()) * sum(x * x for x in b.flatten().tolist()))
    assert cosine(a, b) == pytest.approx(slow)
    assert centred_cosine(a, b, mean) == pytest.approx(cosine(a - mean, b - mean))
    assert cosine(mean, b) > 0.5 and centred_cosine(mean, b, mean) == 0
    assert cosine(a > 0.5, a > 0.5) == pytest.approx(1)  # bool maps


def test_between_tasks_what_all_share_counts_for_nothing():
    generator = torch.Generator().manual_seed(0)
    shared, own, other = torch.rand(1, 500, generator=generator), *torch.rand(2, 6, 500, generator=generator)
    assert between_tasks_cosine(9 * shared + own, own) == pytest.approx(1)
    assert cosine(9 * shared + own, 9 * shared + other) > 0.9
    assert abs(between_tasks_cosine(9 * shared + own, 9 * shared + other)) < 0.05
    a, b = (part - part.mean(0) for part in (own, other))
    assert between_tasks_cosine(own, other) == pytest.approx(torch.cosine_similarity(a, b, 1).mean().item())


def test_the_mean_of_few_maps_makes_unlike_sets_look_alike():
    """A map that says no more than how often each entry responds is rated by the noise of that mean."""
    generator = torch.Generator().manual_seed(0)
    often = torch.rand(20000, generator=generator)
    few, real = ((torch.rand(n, 20000, generator=generator) < often).float() for n in (4, 8))
    guess = often + 0.01 * torch.randn(8, 20000, generator=generator)
    centred = [centred_cosine(*pair, few.mean(0)) for pair in zip(guess, real, strict=True)]
    assert min(centred) > 0.3 and abs(between_tasks_cosine(guess, real)) < 0.02


@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (2, 3, 7), (1, 1)])
def test_packing_round_trip_and_size(shape):
    R = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack(R)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(R.numel() / 8),)
    assert torch.equal(unpack(packed, shape), R)


def test_packing_refuses_probabilities_and_wrong_shapes():
    with pytest.raises(ValueError, match="only a bool response map"):
        pack(torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"2 packed bytes do not hold a response map of shape \(5, 5\)"):
        unpack(pack(torch.ones(4, 4, dtype=torch.bool)), (5, 5))
