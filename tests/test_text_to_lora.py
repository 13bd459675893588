"""The MLP baseline: the mean LoRA before training, every weight learns, it fits what it is shown."""

import pytest
import torch
from test_stages import dataset, run
from tiny_tasks import ACTIONS, DIM, RANK, TEXT, Tasks, loras, sized_network

from lofa_core.conditions import Given
from lofa_core.descriptions import ConditionDescription
from training.baselines.text_to_lora import TextToLoRA, TextToLoRAStage
from training.config import TextToLoRAConfig
from training.judge import predicted_factors

KNOWN = ACTIONS[:3]


def mlp(width=32, blocks=2):
    torch.manual_seed(0)
    net = TextToLoRA(
        Tasks().base_description(), tuple(sized_network().conditions.values()), RANK, width, blocks
    )
    known = loras(3)
    net.statistics["48x48"].fit(known.A[0], known.B[0])
    return net


def stage(net, **changes):
    settings = {"steps": 3, "tasks": 3, "clips": 1, "warm_up": 1, "validate_every": 0} | changes
    known = dataset(KNOWN, loras(3))
    return TextToLoRAStage(net, Tasks(), known, None, TextToLoRAConfig(**settings), torch.device("cpu"))


def told(*sentences):
    return Tasks().conditions([{"text": sentence} for sentence in sentences])


def test_untrained_it_says_the_mean_lora_for_every_task():
    known, data = loras(3), Tasks()
    found = predicted_factors(mlp(), data, [{"text": "someone can wave"}, {"text": "someone can bow"}])
    assert torch.allclose(found.A[0], known.A[0].mean(0).expand(2, -1, -1, -1), atol=1e-6)
    assert torch.allclose(found.B[0], known.B[0].mean(0).expand(2, -1, -1, -1), atol=1e-6)


def test_every_weight_learns_and_its_losses_are_stage_twos(tmp_path):
    net = mlp()
    before = {name: value.clone() for name, value in net.named_parameters()}
    log = run(stage(net, with_lora=0.5, fine_prompts=0.5), tmp_path)
    assert set(log[0]) == {"step", "loss", "diffusion", "distillation", "reconstruction"}
    assert [name for name, value in net.named_parameters() if torch.equal(value, before[name])] == []


def test_it_fits_the_loras_of_its_tasks(tmp_path):
    net, known = mlp(width=64), loras(3)
    settings = {"with_lora": 1.0, "reconstruction_weight": 1.0, "learning_rate": 1e-2, "ema_decay": 0.9}
    trained = stage(net, steps=150, diffusion_weight=0.0, distillation_weight=0.0, **settings)
    run(trained, tmp_path)
    trained.finish()
    found = predicted_factors(net, Tasks(), [{"text": f"someone can {action}"} for action in KNOWN])
    errors = (found.deltas()[0] - known.deltas()[0]).flatten(1).norm(dim=1)
    spread = (known.deltas()[0] - known.deltas()[0].mean(0)).flatten(1).norm(dim=1)
    assert (errors / spread).max() < 0.5


def test_the_base_weights_and_padding_say_nothing_to_it():
    net, data = mlp(), Tasks()
    for head in (*net.to_A.values(), *net.to_B.values()):
        torch.nn.init.normal_(head.weight, std=0.1)
    (W,), index, given = data.weights_by_shape(), torch.arange(8), told("someone can wave")
    longer = {"text": Given(torch.nn.functional.pad(given["text"].values, (0, 0, 0, 5)))}
    found = [net(weights, index, words)[:2] for weights, words in ((W, given), (2 * W, given), (W, longer))]
    for A, B in found[1:]:
        assert torch.allclose(A, found[0][0], atol=1e-5) and torch.allclose(B, found[0][1], atol=1e-5)
    A, B = net(W, index, told("someone can jump"))[:2]
    assert not torch.allclose(A, found[0][0], atol=1e-3)
    some = net(W[2:4], index[2:4], given)[:2]
    assert torch.allclose(some[0], found[0][0][:, 2:4], atol=1e-5)


def test_several_kinds_add_up_by_their_strengths():
    text = sized_network().conditions["text"]
    kinds = (text, ConditionDescription("style", 24))
    net = TextToLoRA(Tasks().base_description(), kinds, RANK, 32, 1)
    words, picture = torch.randn(1, 3, TEXT), torch.randn(1, 4, 24)

    def pooled(**strengths):
        values = {"text": words, "style": picture}
        given = {kind: Given(values[kind], torch.tensor([by])) for kind, by in strengths.items()}
        return sum(net._pooled(kind, given) for kind in given)

    both = pooled(text=1.0, style=0.5)
    assert torch.allclose(both, pooled(text=1.0) + 0.5 * pooled(style=1.0), atol=1e-6)
    assert torch.allclose(pooled(text=1.0, style=0.0), pooled(text=1.0), atol=1e-6)


@pytest.mark.parametrize("wrong", [{"width": 0}, {"blocks": 0}])
def test_sizes_have_to_be_positive(wrong):
    with pytest.raises(ValueError, match="expected 1 or more"):
        TextToLoRAConfig(**wrong)
    assert DIM == 48
