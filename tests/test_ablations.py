"""What can be left out or changed to see what it is good for: inputs in W's place, another Stage I, none."""

import io
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from test_loop import new_run
from test_stages import copied, dataset, moved
from test_stages import stage2 as make_stage2
from tiny import CONFIG, describe, network, text, weights
from tiny_tasks import ACTIONS, DIM, RANK, Tasks, loras, sized_network

from lofa_core.checkpoint import load_hypernetwork, save_hypernetwork
from lofa_core.descriptions import HypernetworkConfig
from lofa_core.hypernetwork import GaussianResponse
from lofa_core.response_map import response_map
from lofa_core.trunk import constants
from training.config import DataConfig, Stage1Config, Stage2Config
from training.miniature.tasks import _spread
from training.stage1 import Stage1, stage1_losses
from training.trainer import train


def predicted(net, W, given=None):
    with torch.no_grad():
        return net(W, torch.arange(len(W)), text() if given is None else given)[:2]


@pytest.mark.parametrize(("weight_input", "looks"), [("magnitude", True), ("constants", False)])
def test_random_constants_stand_in_the_weights_place(weight_input, looks):
    net = network(config=replace(CONFIG, weight_input=weight_input))
    A, B = predicted(net, weights())
    other_A, other_B = predicted(net, 3.0 * torch.randn(weights().shape))
    assert torch.equal(A, other_A) is not looks and torch.equal(B, other_B) is not looks
    again = constants(torch.tensor([5, 2]), (16, 16))
    assert torch.equal(again, constants(torch.tensor([2, 5]), (16, 16)).flip(0))
    assert not torch.equal(again[0], again[1])


def test_the_condition_as_input_sees_no_weights_and_tells_layers_and_conditions_apart(
    tmp_path,
):
    net = network(config=replace(CONFIG, weight_input="condition"))
    assert not net.stage1.trunk.patch_embed and not net.stage2.trunk.patch_embed
    A, B = predicted(net, weights())
    other_A, other_B = predicted(net, 3.0 * torch.randn(weights().shape))
    assert torch.equal(A, other_A) and torch.equal(B, other_B)
    s = net.statistics["16x16"]
    own = (A[0] - s.A_mean) / s.A_scale.view(-1, 1, 1)
    assert not torch.allclose(own[0], own[1], atol=1e-3) and not torch.allclose(own[0], own[8], atol=1e-3)
    told_otherwise = predicted(net, weights(), text(seed=9))
    assert not torch.allclose(A, told_otherwise[0], atol=1e-4)
    save_hypernetwork(net, tmp_path / "net.safetensors")
    kept = predicted(load_hypernetwork(tmp_path / "net.safetensors"), weights())
    assert torch.allclose(kept[0], A, atol=1e-5) and torch.allclose(kept[1], B, atol=1e-5)


def test_what_the_condition_is_made_from_has_to_be_there():
    with pytest.raises(ValueError, match='weight_input = "condition" needs modulation = "film"'):
        HypernetworkConfig(rank=2, weight_input="condition", modulation="layer_scale")
    with pytest.raises(ValueError, match="stage1_blocks = 4: expected 0 to blocks = 3"):
        HypernetworkConfig(rank=2, stage1_blocks=4)


def test_a_lightweight_stage_one_has_fewer_blocks_and_stage_two_starts_from_those(tmp_path):
    net = network(config=replace(CONFIG, blocks=3, stage1_blocks=1, feature_blocks=(0,)))
    assert (len(net.stage1.trunk.blocks), len(net.stage2.trunk.blocks)) == (1, 3)
    before = copied(net.stage2.trunk.blocks[1])
    net.stage2.start_from(net.stage1)
    own = net.stage1.trunk.blocks[0].self_attention.q.weight
    assert torch.equal(net.stage2.trunk.blocks[0].self_attention.q.weight, own)
    assert moved(net.stage2.trunk.blocks[1], before)[0] == []
    predicted(net, weights())


def stage1(**changes):
    net, known = sized_network(0, randomised=False), loras(3, size=0.01)
    net.statistics["48x48"].fit(known.A[0], known.B[0])
    settings = Stage1Config(
        steps=80, tasks=3, layers=8, warm_up=1, validate_every=0, learning_rate=2e-2, **changes
    )
    return Stage1(net, Tasks(), dataset(ACTIONS[:3], known), None, settings, torch.device("cpu"))


def test_stage_one_can_learn_the_lora_itself(tmp_path):
    stage = stage1(target="lora")
    train(stage, stage.settings, tmp_path, Accelerator(cpu=True), Console(file=io.StringIO()))
    log = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert set(log[0]) == {"step", "loss", "reconstruction"}
    known, s = stage.known.loras, stage.hypernetwork.statistics["48x48"]
    picks = [pick for pick, _ in stage._drawn(0, range(3))]
    # At the start it says the mean LoRA: what is left is each LoRA's distance from it.
    A = torch.stack([(known.A[0][k] - s.A_mean).abs().mean((1, 2)) / s.A_scale for k in picks]).mean()
    B = torch.stack([(known.B[0][k] - s.B_mean).abs().mean((1, 2)) / s.B_scale for k in picks]).mean()
    assert log[0]["reconstruction"] == pytest.approx((A + B).item(), rel=1e-3)
    assert sum(x["loss"] for x in log[-5:]) < 0.9 * sum(x["loss"] for x in log[:5])


def test_the_lora_itself_can_stand_beside_the_map():
    both, alone, lora = stage1(reconstruction_weight=0.5), stage1(), stage1(target="lora")
    found = both.losses(both.module, 0, [0, 1])
    maps, reconstruction = (one.losses(one.module, 0, [0, 1]) for one in (alone, lora))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: value.item() for name, value in (maps | reconstruction).items()}
    )
    assert set(found) == {"cross_entropy", "likelihood", "size", "reconstruction"} == {*maps, *reconstruction}
    assert (both.weights["reconstruction"], lora.weights["reconstruction"]) == (0.5, 1.0)


def test_the_threshold_decides_which_entries_respond():
    draw = torch.Generator().manual_seed(1)
    W = torch.randn(2, 8, 8, generator=draw)
    A, B = torch.randn(1, 2, 2, 8, generator=draw), 0.02 * torch.randn(1, 2, 8, 2, generator=draw)
    flat = torch.full((1, 2, 8), -3.0)
    sure = GaussianResponse(A, B, torch.zeros(0), flat, flat)  # dW itself, with hardly any deviation
    for threshold in (0.01, 0.03):
        assert stage1_losses(sure, W, A, B, threshold)["cross_entropy"] < 0.1
        assert torch.equal(
            sure.probability(W, threshold) > 0.5, response_map(W.expand(1, -1, -1, -1), B @ A, threshold)
        )
    assert not torch.equal(response_map(W, (B @ A)[0], 0.01), response_map(W, (B @ A)[0], 0.03))
    seen = {
        t: stage1(threshold=t).losses(stage1().module, 0, [0])["cross_entropy"].item() for t in (0.01, 0.1)
    }
    assert abs(seen[0.01] - seen[0.1]) > 1e-3


def test_a_single_stage_starts_afresh_and_never_runs_stage_one(tmp_path, monkeypatch):
    words = sized_network().conditions["text"]
    config = replace(CONFIG, rank=RANK, feature_blocks=())
    net = network(0, config, describe(depths=1, shape=(DIM, DIM)), True, (words,))
    before = copied(net.stage2)
    stage = make_stage2(net, from_stage1=False)
    assert moved(net.stage2, before)[0] == []
    monkeypatch.setattr(net.stage1, "forward", None)
    assert stage.losses(stage.module, 0, [0, 1])["diffusion"] > 0


def test_fewer_tasks_are_spread_over_all_and_lie_within_twice_as_many():
    every = list(range(448))
    few, more = _spread(every, 32), _spread(every, 64)
    assert len(few) == 32 and set(few) < set(more) < set(_spread(every, 128)) and few[-1] > 400
    assert _spread(every, 0) == _spread(every, 448) == every
    with pytest.raises(ValueError, match="training_tasks = 449: expected 0 to 448"):
        _spread(every, 449)


def test_a_single_stage_with_features_is_refused(tmp_path):
    data = DataConfig(clips_per_task=1, lora_tasks=2)
    run = new_run(tmp_path / "run", data=data, stage2=Stage2Config(from_stage1=False))
    with pytest.raises(ValueError, match=r"from_stage1 = false has no features: set network.feature_blocks"):
        run.stage2()
