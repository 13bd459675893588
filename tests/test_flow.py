"""Flow matching against its equations written out, and the sampler against fields whose end is known."""

import pytest
import torch
from tiny import generator

from training import flow

SHAPE = (3, 2, 2, 3, 3)


def draw(seed=0):
    source = generator(seed)
    return (
        torch.randn(SHAPE, generator=source),
        torch.randn(SHAPE, generator=source),
        torch.tensor([0.0, 0.3, 1.0]),
    )


def test_noised_mixes_every_clip_by_its_own_time():
    clean, noise, times = draw()
    found = flow.noised(clean, noise, times)
    for i, t in enumerate((0.0, 0.3, 1.0)):
        assert torch.allclose(found[i], (1 - t) * clean[i] + t * noise[i], atol=1e-6)
    assert torch.equal(found[0], clean[0]) and torch.equal(found[2], noise[2])
    assert flow.noised(clean.half(), noise.half(), times).dtype == torch.float16


def test_the_velocity_is_the_derivative_of_the_path():
    clean, noise, _ = (x.double() for x in draw())
    times = torch.tensor([0.2, 0.5, 0.8])
    step = (
        flow.noised(clean, noise, times.double() + 1e-6) - flow.noised(clean, noise, times.double())
    ) / 1e-6
    assert flow.loss(lambda x, t: step, clean, noise, times) < 1e-12


def test_weights_scale_each_entry_of_a_latent():
    clean, noise, times = draw()
    weights = torch.rand(SHAPE[1:], generator=generator(5))
    error = (0.3 - (noise - clean)).square()
    by_hand = sum((weights * clip).sum() for clip in error) / error.numel()
    found = flow.loss(lambda x, t: torch.full_like(x, 0.3), clean, noise, times, weights)
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_the_loss_is_the_mean_squared_error_of_what_the_model_says_at_x_t():
    clean, noise, times = draw()
    asked = []

    def velocity(x, t):
        asked.append((x, t))
        return 0.5 * x

    found = flow.loss(velocity, clean, noise, times)
    total = 0.0
    for i, t in enumerate(times.tolist()):
        for c, e in zip(clean[i].flatten().tolist(), noise[i].flatten().tolist(), strict=True):
            total += (0.5 * ((1 - t) * c + t * e) - (e - c)) ** 2
    assert found.item() == pytest.approx(total / clean.numel(), rel=1e-5)
    assert torch.equal(asked[0][1], times) and len(asked) == 1


def test_random_times_lie_between_the_ends_denser_above_the_middle_and_repeat_by_seed():
    times = flow.random_times(4000, generator(1))
    assert times.shape == (4000,) and (times > 0).all() and (times < 1).all()
    assert torch.equal(times, flow.random_times(4000, generator(1)))
    assert not torch.equal(times, flow.random_times(4000, generator(2)))
    # logit-normal around one half: its median is sigmoid(0.5), its quartiles lie 0.6745 deviations off
    for share, z in ((0.25, -0.6745), (0.5, 0.0), (0.75, 0.6745)):
        wanted = torch.sigmoid(torch.tensor(0.5 + 1.2 * z)).item()
        assert times.quantile(share).item() == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_times_run_from_one_to_zero_by_wans_formula(shift):
    times = flow.shifted_times(5, shift)
    wanted = [shift * (1 - i / 5) / (1 + (shift - 1) * (1 - i / 5)) for i in range(6)]
    assert times.tolist() == pytest.approx(wanted, abs=1e-6)
    assert times[0] == 1.0 and times[-1] == 0.0 and (times.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 7])
def test_sampling_a_straight_path_ends_at_the_clip_in_any_number_of_steps(steps):
    clean, noise, _ = draw()
    asked = []

    def velocity(x, t):
        asked.append(t)
        return (x - clean) / t.view(-1, 1, 1, 1, 1)

    assert torch.allclose(flow.sample(velocity, noise, steps, 3.0), clean, atol=1e-5)
    assert len(asked) == steps and all(t.shape == (3,) for t in asked)
    assert torch.allclose(torch.stack([t[0] for t in asked]), flow.shifted_times(steps, 3.0)[:-1])


def test_sampling_takes_eulers_steps_of_a_curved_field():
    _, noise, _ = draw()
    found = flow.sample(lambda x, t: x * t.view(-1, 1, 1, 1, 1), noise, 3, 2.0)
    times = [2 * t / (1 + t) for t in (1.0, 2 / 3, 1 / 3, 0.0)]
    factor = 1.0
    for now, then in zip(times[:-1], times[1:], strict=True):
        factor *= 1.0 + (then - now) * now
    assert torch.allclose(found, factor * noise, atol=1e-5)


def test_sampling_keeps_no_graph():
    weight = torch.ones((), requires_grad=True)
    assert not flow.sample(lambda x, t: weight * x, draw()[1], 2).requires_grad
