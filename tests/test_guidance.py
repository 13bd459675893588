"""HM-CFG as a formula: against the formula as DESIGN writes it, its special cases, its windows."""

import itertools

import pytest
import torch

from lofa_core.guidance import HybridGuidance, Prediction, coefficients, guide, progress

NEGATIVE, BASE, PERSONALISED = Prediction.NEGATIVE, Prediction.BASE, Prediction.PERSONALISED


@pytest.fixture
def said():
    drawn = torch.randn(3, 2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    return dict(zip(Prediction, drawn, strict=True))


@pytest.mark.parametrize(
    ("w_base", "w_subject"), list(itertools.product([-1.5, 0.0, 1.0, 3.0, 7.5], [-2.0, 0.0, 1.0, 3.0, 9.0]))
)
def test_the_formula(said, w_base, w_subject):
    truth = said[NEGATIVE] + w_base * (said[BASE] - said[NEGATIVE])
    truth = truth + w_subject * (said[PERSONALISED] - said[BASE])
    assert torch.allclose(guide(said, w_base, w_subject), truth, atol=1e-5)


def test_without_the_subject_it_is_plain_cfg_to_the_last_bit(said):
    cfg = said[NEGATIVE] + 5.0 * (said[BASE] - said[NEGATIVE])
    assert torch.equal(guide({NEGATIVE: said[NEGATIVE], BASE: said[BASE]}, 5.0, 0.0), cfg)


def test_equal_weights_are_asymmetric_cfg_and_never_look_at_the_base_under_the_prompt(said):
    asymmetric = said[NEGATIVE] + 4.0 * (said[PERSONALISED] - said[NEGATIVE])
    del said[BASE]
    assert torch.equal(guide(said, 4.0, 4.0), asymmetric)


@pytest.mark.parametrize(
    ("w_base", "w_subject", "needed"),
    [
        (5.0, 3.0, {NEGATIVE, BASE, PERSONALISED}),
        (5.0, 0.0, {NEGATIVE, BASE}),
        (5.0, 5.0, {NEGATIVE, PERSONALISED}),
        (1.0, 3.0, {BASE, PERSONALISED}),
        (1.0, 0.0, {BASE}),
        (1.0, 1.0, {PERSONALISED}),
        (0.0, 0.0, {NEGATIVE}),
        (0.0, 2.0, {NEGATIVE, BASE, PERSONALISED}),
    ],
)
def test_predictions_that_change_nothing_are_not_asked_for(said, w_base, w_subject, needed):
    factors = coefficients(w_base, w_subject)
    assert set(factors) == needed and sum(factors.values()) == pytest.approx(1.0)
    only = {prediction: said[prediction] for prediction in needed}
    assert torch.equal(guide(only, w_base, w_subject), guide(said, w_base, w_subject))
    with pytest.raises(ValueError, match="Give it too"):
        guide(dict(list(only.items())[1:]), w_base, w_subject)


def test_half_precision_keeps_what_differs():
    """Three large predictions that differ a little, as late in sampling."""
    said = {p: torch.tensor([100.0 + 0.5 * n], dtype=torch.bfloat16) for n, p in enumerate(Prediction)}
    assert guide(said, 7.5, 3.0).item() == pytest.approx(100.0 + 4.5 * 0.5 + 3.0 * 1.0, abs=0.5)


def test_one_shape():
    with pytest.raises(ValueError, match=r"\[2, 1\].*\[2, 3\]"):
        guide({NEGATIVE: torch.ones(2, 1), BASE: torch.ones(2, 3)}, 5.0, 0.0)


@pytest.mark.parametrize(
    ("done", "weights"),
    [(0.0, (1.0, 3.0)), (0.24, (1.0, 3.0)), (0.25, (5.0, 3.0)), (0.5, (5.0, 0.0)), (0.74, (5.0, 0.0)),
     (0.75, (1.0, 0.0)), (0.99, (1.0, 0.0))],
)  # fmt: skip
def test_outside_its_window_a_weight_does_nothing(done, weights):
    guidance = HybridGuidance(5.0, 3.0, base_window=(0.25, 0.75), subject_window=(0.0, 0.5))
    assert guidance.at(done) == weights


def test_by_default_every_step_is_guided():
    assert {HybridGuidance(4.0, 2.0).at(step / 7) for step in range(7)} == {(4.0, 2.0)}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"w_base": float("nan")}, "w_base nan"),
        ({"w_subject": float("inf")}, "w_subject inf"),
        ({"base_window": (0.6, 0.5)}, "base window goes from 0.6 to 0.5"),
        ({"subject_window": (0.0, 1.5)}, "subject window goes from 0.0 to 1.5"),
        ({"subject_window": (-0.1, 1.0)}, "subject window goes from -0.1"),
    ],
)
def test_bad_weights_and_windows_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        HybridGuidance(**wrong)


@pytest.mark.parametrize(
    ("now", "schedule", "expected"),
    [
        (10.0, [10.0, 4.0, 2.0, 1.0], 0.0),
        (2.0, [10.0, 4.0, 2.0, 1.0], 0.5),
        (2.0000002, [10.0, 4.0, 2.0, 1.0], 0.5),  # a sampler's own rounding
        (0.3, [10.0, 4.0, 2.0, 1.0], 0.75),
        (11.0, [10.0, 4.0, 2.0, 1.0], 0.0),  # noise added back before the step
        (3.5, [10.0, 4.0, 2.0, 1.0], 0.25),
        (4.0, [1.0, 2.0, 4.0, 10.0], 0.5),  # towards noise
        (750.0, [999.0, 750.0, 750.0, 500.0, 500.0, 250.0, 250.0], 0.25),  # diffusers' Heun
    ],
)
def test_progress_is_the_fraction_of_steps_behind(now, schedule, expected):
    assert progress(now, schedule) == expected
