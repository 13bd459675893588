"""Both stages at once from clips alone; and activations computed again give the same gradients everywhere."""

import io
import json

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from test_stages import stage2
from tiny_tasks import ACTIONS, DIM, RANK, Tasks, sized_network

from lofa_core.normalisation import TargetStatistics
from training.config import EndToEndConfig
from training.end_to_end import EndToEnd
from training.factors import Factors
from training.trainer import train


def end_to_end(randomised=False, **changes):
    settings = {"steps": 3, "tasks": 2, "clips": 1, "warm_up": 1, "validate_every": 0} | changes
    net = sized_network(randomised=randomised)
    draw = torch.Generator().manual_seed(0)
    net.statistics["48x48"].start(0.1 * torch.randn(8, RANK, DIM, generator=draw), scale=0.05)
    data = Tasks(ACTIONS[:2], clips=1)
    return EndToEnd(net, data, EndToEndConfig(**settings), torch.device("cpu"))


def run(stage, folder):
    train(stage, stage.settings, folder, Accelerator(cpu=True), Console(file=io.StringIO()))
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_a_start_without_loras_is_no_change_in_units_of_its_own():
    A = 0.1 * torch.randn(3, 2, 6)
    statistics = TargetStatistics(3, 2, 5, 6)
    statistics.start(A, 0.05)
    index = torch.arange(3)
    zero_A, zero_B = statistics.denormalise(torch.zeros(3, 2, 6), torch.zeros(3, 5, 2), index)
    assert torch.equal(zero_A, A) and not zero_B.any()
    one_A, one_B = statistics.denormalise(torch.ones(3, 2, 6), torch.ones(3, 5, 2), index)
    assert torch.allclose(one_B, torch.tensor(0.05))
    assert torch.allclose(one_A - A, A.square().mean(dim=(1, 2), keepdim=True).sqrt().expand_as(A))


def test_it_starts_as_the_base_model_and_learns_from_clips_alone(tmp_path):
    stage = end_to_end(steps=40, fine_prompts=0.0, learning_rate=1e-2, output_scale=0.5)
    (W,) = stage.data.weights_by_shape()

    def predicted():
        given = stage.data.conditions([{"text": "someone can wave"}])
        A, B, _ = stage.hypernetwork(W, torch.arange(8), given)
        return B @ A

    @torch.no_grad()
    def loss():  # of the same items with the same noise
        found = [stage.losses(stage.module, step, [0, 1])["diffusion"].item() for step in range(8)]
        return sum(found) / len(found)

    before = loss()
    assert not predicted().any()
    log = run(stage, tmp_path)
    assert set(log[0]) == {"step", "loss", "diffusion", "size"} and log[0]["size"] == 0.0 < log[-1]["size"]
    assert loss() < 0.98 * before
    stage.finish()
    assert predicted().abs().max() > 0.0


def test_gradients_reach_both_trunks_and_stage_twos_heads():
    stage = end_to_end(randomised=True)
    losses = stage.losses(stage.module, 0, [0, 1])
    sum(losses.values()).backward()
    missing = [n for n, p in stage.module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert missing == []
    assert all(p.grad is None for p in stage.hypernetwork.stage1.heads.parameters())


def test_the_size_is_the_mean_square_of_what_the_network_puts_out():
    stage = end_to_end()
    out_A, out_B = torch.randn(2, 8, RANK, DIM), torch.randn(2, 8, DIM, RANK)
    A, B = stage.hypernetwork.statistics["48x48"].denormalise(out_A, out_B, torch.arange(8))
    found = stage._on_factors(Factors((A,), (B,)), torch.tensor([-1, -1]))
    assert found["size"].item() == pytest.approx(
        (out_A.square().mean() + out_B.square().mean()).item(), rel=1e-3
    )


@pytest.mark.parametrize("make", [lambda **c: end_to_end(True, **c), stage2], ids=["end_to_end", "stage2"])
def test_activations_computed_again_in_the_backward_pass_give_the_same_gradients(make):
    """The published code computes the last block again in every block's place."""
    gradients = []
    for again in (False, True):
        stage = make(checkpoint_activations=again)
        for part in (stage.hypernetwork.stage1, stage.hypernetwork.stage2):
            part.trunk.checkpoint_activations = again
        calls = []
        stage.denoiser.model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        stage.hypernetwork.stage2.trunk.blocks[0].register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(2)
        )
        sum(stage.losses(stage.module, 0, [0, 1]).values()).backward()
        assert calls.count(2) == (2 if again else 1)
        assert not again or calls.count(1) >= 2
        gradients.append({n: p.grad for n, p in stage.module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    assert all(torch.allclose(value, gradients[1][name], atol=1e-6) for name, value in gradients[0].items())


def test_there_are_no_loras_in_it():
    with pytest.raises(ValueError, match="with_lora = 0.5: end-to-end training has no LoRAs"):
        EndToEndConfig(with_lora=0.5)
