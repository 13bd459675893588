"""Several kinds of condition in one network: any of them, at any strength, each item of a batch by itself."""

from itertools import combinations

import pytest
import torch
from tiny import CONFIG, POSE, STYLE, TEXT, base_tensors, condition, generator, network, text, weights
from torch.nn import functional as F

from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import load_hypernetwork, save_hypernetwork
from lofa_core.conditions import Given, weakened
from lofa_core.conditions.encoders import PoseEncoder
from lofa_core.descriptions import ConditionDescription
from lofa_core.prediction import predict, predict_response

ALL = (TEXT, POSE, STYLE)
KINDS = [known.kind for known in ALL]
INDEX = torch.tensor([0, 7, 12])


@pytest.fixture(scope="module")
def net():
    return network(conditions=ALL)


def told(*kinds, count=1, seed=0):
    """Conditions of these kinds, always the same of a seed."""
    values = {
        "text": condition(count, tokens=5, seed=seed),
        "pose": torch.rand(count, 3, *POSE.size, generator=generator(seed + 1)),
        "style": condition(count, tokens=4, seed=seed + 2, width=STYLE.width),
    }
    return {kind: Given(values[kind]) for kind in kinds}


def at(conditions, **strengths):
    """The same with strengths: a number for all items, or a list with one for each."""
    count = len(next(iter(conditions.values())).values)
    return {
        kind: Given(given.values, torch.tensor(strengths[kind]).expand(count) if kind in strengths else None)
        for kind, given in conditions.items()
    }


@torch.no_grad()
def outputs(net, conditions):
    """All that both stages say of three layers, [B, n]."""
    A, B, response = net(weights()[INDEX], INDEX, conditions)
    said = (A, B, response.A, response.B, response.row_log_deviation, response.column_log_deviation)
    return torch.cat([part.flatten(1) for part in said], 1)


def close(a, b, tolerance=1e-6):
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def test_any_of_the_kinds_can_be_given_and_each_is_heard(net):
    subsets = [some for count in (1, 2, 3) for some in combinations(KINDS, count)]
    found = [outputs(net, told(*some)) for some in subsets]
    assert len(found) == 7 and all(torch.isfinite(values).all() for values in found)
    assert all((a - b).abs().max() > 1e-2 for a, b in combinations(found, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_at_strength_zero_a_kind_is_as_if_it_were_not_given(net, kind):
    others = [other for other in KINDS if other != kind]
    without = outputs(net, told(*others))
    assert close(outputs(net, at(told(*KINDS), **{kind: 0.0})), without)
    nothing = told(*KINDS) | {kind: Given(torch.zeros_like(told(kind)[kind].values), torch.zeros(1))}
    assert close(outputs(net, nothing), without)
    assert not close(outputs(net, told(*KINDS)), without, 1e-2)


def test_strength_one_is_what_training_gives_and_nothing_told_is_the_same_for_every_kind(net):
    assert close(outputs(net, at(told(*KINDS), text=1.0, pose=1.0, style=1.0)), outputs(net, told(*KINDS)))
    silent = [outputs(net, at(told(kind), **{kind: 0.0})) for kind in KINDS]
    silent.append(outputs(net, at(told(*KINDS, seed=5), text=0.0, pose=0.0, style=0.0)))
    assert all(close(silent[0], other) for other in silent[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_fades_a_kind_in_without_a_jump(net, kind):
    def found(strength):
        return outputs(net, at(told(*KINDS), **{kind: strength}))

    def step(low, high):
        return (found(low) - found(high)).abs().max().item()

    whole = step(0.0, 1.0)
    assert min(step(0.0, 0.3), step(0.3, 0.6), step(0.6, 1.0), step(1.0, 1.6)) > 0.02 * whole
    for strength in (0.0, 0.5, 1.0):
        assert 0.0 < step(strength, strength + 1e-4) < 0.01 * whole


def test_a_weakened_condition_keeps_its_values_and_multiplies_its_strength():
    given = told("style", count=2)["style"]
    half = weakened(given, 0.5)
    assert half.values is given.values and half.strength.tolist() == [0.5, 0.5]
    assert weakened(half, 3.0).strength.tolist() == [1.5, 1.5]
    assert weakened(given, 1.0).strength is None and weakened(half, 1.0) is half


@torch.no_grad()
def test_what_is_attended_to_is_the_tokens_of_all_kinds_by_their_strength_and_one_that_is_always_there(net):
    trunk = net.stage2.trunk
    alone = {kind: trunk.project(told(kind)) for kind in KINDS}
    strengths = {"text": 0.5, "pose": 2.0, "style": 0.25}
    found = trunk.project(at(told(*KINDS), **strengths))
    sizes = {kind: part.keys_values[0][0].shape[2] - 1 for kind, part in alone.items()}
    assert sizes == {"text": 5, "pose": 4, "style": 4}  # pose: ceil(5 / 4) x 32 / 16 x 16 / 16
    wanted = torch.cat([torch.full((sizes[kind],), strengths[kind]).log() for kind in KINDS])
    assert torch.allclose(found.bias[0, 0, 0], F.pad(wanted, (0, 1)))
    for block, (keys, values) in enumerate(found.keys_values):
        parts = [alone[kind].keys_values[block] for kind in KINDS]
        for one, own in zip((keys, values), zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat([*(part[:, :, :-1] for part in own), own[0][:, :, -1:]], 2))
    assert close(found.summary, sum(strengths[kind] * alone[kind].summary for kind in KINDS), 1e-5)


def test_items_of_a_batch_with_different_kinds_get_what_they_get_alone(net):
    given = told(*KINDS, count=5)
    items = [("text",), ("pose",), ("style",), KINDS, ()]
    there = {kind: [float(kind in item) for item in items] for kind in KINDS}
    values = {kind: part.values.clone() for kind, part in given.items()}
    values["style"][3, 2:] = 0.0  # a shorter one, with padding
    for kind, strengths in there.items():
        values[kind][torch.tensor(strengths) == 0] = 0.0  # as a batch holds what is not there
    together = outputs(net, at({kind: Given(values[kind]) for kind in KINDS}, **there))
    for row, item in enumerate(items):
        alone = {kind: Given(values[kind][row : row + 1]) for kind in item}
        wanted = outputs(net, alone or at(told("text"), text=0.0))
        assert close(together[row : row + 1], wanted, 1e-5), item


def test_the_order_in_which_kinds_are_given_does_not_matter(net):
    given = at(told(*KINDS), text=0.7)
    assert torch.equal(outputs(net, given), outputs(net, dict(reversed(given.items()))))


@torch.no_grad()
def test_the_same_tokens_given_as_another_kind_are_told_apart_by_the_kinds_own_embedding():
    net = network(conditions=(STYLE, ConditionDescription("identity", STYLE.width)))
    trunks = [stage.trunk for stage in (net.stage1, net.stage2)]
    for trunk in trunks:  # all else is the same for both
        for part in (trunk.condition_proj, trunk.summary):
            part["identity"].load_state_dict(part["style"].state_dict())
    tokens = Given(condition(tokens=4, width=STYLE.width))
    style, identity = (outputs(net, {kind: tokens}) for kind in ("style", "identity"))
    assert not close(style, identity, 1e-2)
    for trunk in trunks:
        trunk.modality["identity"].copy_(trunk.modality["style"])
    assert close(outputs(net, {"identity": tokens}), outputs(net, {"style": tokens}))


@pytest.mark.parametrize("strength", [None, 0.5])
def test_padding_rows_of_style_do_not_matter_and_its_own_rows_do(net, strength):
    strengths = {} if strength is None else {"style": strength}
    rows = told("style")["style"].values

    def found(values):
        return outputs(net, at(told("text", "pose") | {"style": Given(values)}, **strengths))

    wanted, nothing = found(rows), torch.zeros(1, 3, STYLE.width)
    assert close(found(torch.cat([rows, nothing], 1)), wanted, 1e-5)
    assert close(found(torch.cat([rows[:, :2], nothing, rows[:, 2:], nothing], 1)), wanted, 1e-5)
    for row in range(4):
        changed = rows.clone()
        changed[0, row, 0] += 1.0
        assert not close(found(changed), wanted, 1e-3)


def test_a_style_of_nothing_but_padding_is_refused_unless_its_strength_is_zero(net):
    silent = told("text", count=2) | {"style": Given(torch.zeros(2, 3, STYLE.width))}
    for strengths in ([0.0, 1.0], [0.5, 0.5]):
        with pytest.raises(ValueError, match="condition has no tokens"):
            outputs(net, at(silent, style=strengths))
    assert close(outputs(net, at(silent, style=0.0)), outputs(net, told("text", count=2)))


def test_kinds_that_a_network_does_not_know_are_refused_and_named(net):
    with pytest.raises(ValueError, match="given identity: this network knows text, pose, style"):
        outputs(net, {"identity": told("style")["style"]})
    with pytest.raises(ValueError, match="given no condition"):
        outputs(net, {})
    base = BaseWeights.from_tensors(base_tensors())
    for run in (predict, predict_response):
        with pytest.raises(ValueError, match="conditioned on text and pose and style, not on identity"):
            run(net, base, told("text") | {"identity": told("style")["style"]})


def test_a_strength_where_there_is_one_kind_alone_is_refused():
    with pytest.raises(ValueError, match="one kind of condition, whose strength is always 1"):
        outputs(network(), at(text(), text=0.5))


def test_a_pose_of_another_size_is_refused_with_both_sizes(net):
    for size in ((4, 32, 16), (5, 16, 32)):
        pose = {"pose": Given(torch.rand(1, 3, *size))}
        sizes = rf"\[{size[0]}, {size[1]}, {size[2]}\].*\[5, 32, 16\]"
        with pytest.raises(ValueError, match=sizes):
            outputs(net, pose)
        with pytest.raises(ValueError, match=r"The pose condition is .*expects \[1, 3, 5, 32, 16\]"):
            predict(net, BaseWeights.from_tensors(base_tensors()), pose)


def test_a_pose_has_a_token_for_four_frames_of_16_by_16_pixels_and_knows_where_it_is():
    torch.manual_seed(0)
    encoder = PoseEncoder(ConditionDescription("pose", 3, size=(17, 64, 64)), 16)
    assert encoder(torch.rand(1, 3, 17, 64, 64)).shape == (1, 5 * 4 * 4, 16)
    still = encoder(torch.zeros(1, 3, 17, 64, 64))[0]  # away from the edges only places differ
    inside = [16 * 2 + 4 * y + x for y in (1, 2) for x in (1, 2)]
    assert all((still[a] - still[b]).abs().max() > 1e-2 for a, b in combinations(inside, 2))


def test_gradients_reach_every_parameter_of_every_encoder_and_are_finite():
    net = network(conditions=ALL)
    given = at(told(*KINDS, count=2), text=[1.0, 0.0], pose=[1.0, 1.0], style=[0.0, 0.5])
    A, B, response = net(weights(), torch.arange(16), given)
    deviations = response.row_log_deviation, response.column_log_deviation
    sum(part.square().mean() for part in (A, B, response.A, response.B, *deviations)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert net.stage1.trunk.condition_proj["pose"].convolutions[0].weight.grad.abs().max() > 1e-6
    assert net.stage2.trunk.condition_proj["style"][1].weight.grad.abs().max() > 1e-6


def test_a_network_of_all_kinds_comes_back_from_its_file_and_predicts_the_same(net, tmp_path):
    save_hypernetwork(net, tmp_path / "net.safetensors")
    found = load_hypernetwork(tmp_path / "net.safetensors")
    assert found.config == CONFIG and found.conditions == {known.kind: known for known in ALL}
    assert list(found.conditions) == KINDS and found.coarse_prompt == "a person"
    base = BaseWeights.from_tensors(base_tensors())
    given = at(told(*KINDS), style=0.5)
    one, other = (predict(made, base, given) for made in (net, found))
    assert one.lora.metadata["lofa_condition"] == "text + pose + style"
    for name in one.lora:
        assert close(one.lora[name].A, other.lora[name].A) and close(one.lora[name].B, other.lora[name].B)
        assert close(one.responses[name], other.responses[name], 1e-5)


@torch.no_grad()
def test_prediction_gives_what_the_network_gives_for_the_same_strengths(net):
    given = at(told(*KINDS), pose=0.3)
    found = predict(net, BaseWeights.from_tensors(base_tensors()), given).lora
    A, B, _ = net(weights(), torch.arange(16), given)
    for number, layer in enumerate(net.base.layers):
        assert close(found[layer.name].A, A[0, number], 1e-5)
        assert close(found[layer.name].B, B[0, number], 1e-5)
