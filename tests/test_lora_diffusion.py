"""LoRA Diffusion: its codec, its equations, what it learns, its file, and the one door to both generators."""

import io
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from test_checkpoint import rewrite
from tiny import CONFIG, TEXT, base_tensors, describe, generator, network, text
from tiny_tasks import ACTIONS, RANK, Tasks, loras

from lofa_core import generators
from lofa_core.__main__ import main
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import (
    DIFFUSION_FORMAT,
    load_generator,
    load_hypernetwork,
    save_hypernetwork,
    save_lora_diffusion,
)
from lofa_core.conditions import Given
from lofa_core.heatmap import render
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.inspection import inspect
from lofa_core.lora_diffusion import (
    LoRADiffusion,
    LoRADiffusionConfig,
    ddim_step,
    guided,
    noise,
    noised,
    sample,
    signal,
    velocity,
    x0_from_velocity,
)
from lofa_core.lora_latent import kl_divergence
from training.config import LoRADiffusionConfig as StageSettings
from training.config import LoRAVAEConfig, TrainingConfig
from training.lora_dataset import LoRADataset
from training.lora_diffusion import (
    LoRADiffusionStage,
    LoRAVAEStage,
    drawn_factors,
    factors_of,
    loras_of,
    mean_distance,
    new_network,
    relative_distance,
    some_untold,
    spread,
)
from training.trainer import train

SMALL = LoRADiffusionConfig(
    rank=3, latent=5, layer_width=4, vae_width=8, width=8, blocks=2, pooling_queries=2, steps=4
)
BASE = BaseWeights.from_tensors(base_tensors())


def small(seed=0, config=SMALL, conditions=(TEXT,)):
    """A LoRA Diffusion over 2 x 8 layers; nothing in it is zero, so all of it is heard."""
    torch.manual_seed(seed)
    found = LoRADiffusion(config, describe(), conditions)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return found.eval().requires_grad_(False)


def same(one, other):
    return all(torch.allclose(one.delta(name), other.delta(name), atol=1e-3) for name in one)


def test_the_equations_of_the_process():
    draw, t = generator(1), torch.tensor([0.0, 0.2, 0.7, 1.0])
    x0, epsilon = torch.randn(4, 6, generator=draw), torch.randn(4, 6, generator=draw)
    x, v = noised(x0, epsilon, t), velocity(x0, epsilon, t)
    assert torch.allclose(signal(t) ** 2 + noise(t) ** 2, torch.ones(4))
    assert torch.equal(x[0], x0[0]) and torch.allclose(x[3], epsilon[3], atol=1e-6)
    assert torch.allclose(x0_from_velocity(x, v, t), x0, atol=1e-5)
    to = torch.tensor([0.0, 0.1, 0.3, 0.0])
    assert torch.allclose(ddim_step(x, x0, t, to)[1:], noised(x0, epsilon, to)[1:], atol=1e-5)
    assert torch.equal(guided(x0, epsilon, 1.0), epsilon + (x0 - epsilon))
    mean, log_variance = torch.tensor([0.0, 2.0]), torch.tensor([0.0, math.log(4.0)])
    assert kl_divergence(mean, log_variance).tolist() == pytest.approx([0.0, 0.5 * (8 - 1 - math.log(4))])


def test_sampling_with_the_exact_denoiser_of_a_gaussian_gives_that_gaussian():
    """Normal(1, 0.5^2): x0 seen from x_t is its posterior mean; DDIM carries noise to quantiles."""

    def denoise(x, t):
        s, n = signal(t)[:, None], noise(t)[:, None]
        return 1.0 + 0.25 * s / (0.25 * s**2 + n**2) * (x - s)

    start = torch.tensor([[-1.5], [0.0], [2.0]])
    assert torch.allclose(sample(denoise, start, 400), 1.0 + 0.5 * start, atol=0.02)


def test_a_seed_gives_one_lora_another_seed_another_and_the_condition_is_heard():
    found = [generators.predict(small(), BASE, text(), seed=seed).lora for seed in (0, 0, 1)]
    assert all(torch.equal(found[0].delta(name), found[1].delta(name)) for name in found[0])
    assert not same(found[0], found[2]) and found[2].metadata["lofa_seed"] == "1"
    assert [layer.name for layer in describe().layers] == list(found[0]) and found[0].rank == 3
    assert not same(found[0], generators.predict(small(), BASE, text(seed=5), seed=0).lora)


def test_a_strength_of_zero_is_as_if_nothing_were_told_and_padding_is_not_heard():
    told, values = small().denoiser.told, text()["text"].values
    assert not told({"text": Given(values, torch.zeros(1))}).any()
    longer = torch.cat([values, torch.zeros(1, 3, values.shape[2])], 1)
    assert torch.allclose(told({"text": Given(longer)}), told({"text": Given(values)}), atol=1e-5)
    with pytest.raises(ValueError, match="every row of it is zero"):
        told({"text": Given(torch.zeros_like(values))})
    with pytest.raises(ValueError, match="given pose: this network knows text"):
        told({"pose": Given(values)})
    kept = some_untold(text(count=2), torch.tensor([0.0, 1.0]))["text"]
    assert not told({"text": kept})[0].any() and told({"text": kept})[1].any()


def test_guidance_goes_away_from_what_is_told_nothing():
    plain = small(config=replace(SMALL, steps=1, target="x0"))
    strong, weak = (small(config=replace(plain.config, guidance=scale)) for scale in (2.0, 0.0))
    one, two, none = (_latent(net) for net in (plain, strong, weak))
    assert torch.allclose(two - none, 2.0 * (one - none), atol=1e-4) and not torch.allclose(one, none)


def _latent(net):
    """What the VAE is given: linear in the guidance, for one step of x0."""
    seen = []
    decode = net.vae.decode
    net.vae.decode = lambda latent: seen.append(latent) or decode(latent)
    net.draw(text(), torch.ones(1, SMALL.latent))
    return seen[0]


def known_tasks(count=3):
    factors = loras(count)
    return Tasks(ACTIONS[:count]), LoRADataset(factors, list(ACTIONS[:count]))


VAE = LoRAVAEConfig(
    steps=250, tasks=6, warm_up=5, checkpoint_every=250, validate_every=0, learning_rate=5e-3, latent=4,
    layer_width=8, width=32, blocks=0, noise=0.0, form="trained",
)  # fmt: skip
DIFFUSION = StageSettings(
    steps=500, tasks=24, warm_up=10, checkpoint_every=250, validate_every=0, learning_rate=4e-3, width=48,
    blocks=2, pooling_queries=2, sampling_steps=20, ema_decay=0.98,
)  # fmt: skip


def trained(folder, vae=VAE, diffusion=DIFFUSION, stop_after=lambda step: None):
    """(network, tasks, their LoRAs) after both stages."""
    data, known = known_tasks()
    config = TrainingConfig("miniature", str(folder), lora_vae=vae, lora_diffusion=diffusion)
    config = replace(config, lora=replace(config.lora, rank=RANK))
    net = new_network(config, data.base_description(), (replace(TEXT, width=64),))
    console, cpu = Console(file=io.StringIO()), torch.device("cpu")
    first = LoRAVAEStage(net, known, known, vae, cpu)
    train(first, vae, folder / "lora_vae", Accelerator(cpu=True), console)
    first.finish()
    second = LoRADiffusionStage(net, data, known, known, diffusion, cpu)
    train(second, diffusion, folder / "lora_diffusion", Accelerator(cpu=True), console, stop_after)
    second.finish()
    return net.eval(), data, known


@pytest.mark.parametrize("target", ["v", "x0"])
def test_trained_on_three_loras_a_draw_for_each_condition_is_that_lora(tmp_path, target):
    net, data, known = trained(tmp_path, diffusion=replace(DIFFUSION, target=target))
    told = [data.condition(task, None) for task in known.tasks]
    for seed in range(2):
        found = drawn_factors(net, data, told, seed)
        real = known.loras.deltas()[0].flatten(1)
        apart = torch.cdist(found.deltas()[0].flatten(1), real) / real.norm(dim=1)
        assert apart.diagonal().max() < 0.35 and apart.argmin(1).tolist() == [0, 1, 2]
    figures = spread(net, data, told, known.loras)
    assert figures["between_seeds"] < 0.3 < figures["between_conditions"]
    assert figures["between_tasks"] == pytest.approx(mean_distance(known.loras))


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    vae = replace(VAE, steps=4, checkpoint_every=2, validate_every=2)
    diffusion = replace(DIFFUSION, steps=4, checkpoint_every=2, validate_every=2)
    whole, *_ = trained(tmp_path / "whole", vae, diffusion)

    def kill(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", vae, diffusion, kill)
    again, *_ = trained(tmp_path / "killed", vae, diffusion)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


def test_factors_and_loras_are_one_another_and_distances_are_relative():
    factors = loras(3)
    base = Tasks().base_description()
    back = factors_of(loras_of(factors, base), base)
    assert all(torch.equal(a, b) for a, b in zip((*factors.A, *factors.B), (*back.A, *back.B), strict=True))
    one, other = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    assert relative_distance(one, one) == 0.0 and relative_distance(one, other) == pytest.approx(2**0.5)


@pytest.fixture
def saved(tmp_path):
    """(network, file)."""
    net, path = small(), tmp_path / "net.safetensors"
    save_lora_diffusion(net, path, notes="a test")
    return net, path


def test_the_file_holds_everything_and_one_loader_tells_both_apart(saved, tmp_path):
    net, path = saved
    found = load_generator(path)
    assert isinstance(found, LoRADiffusion)
    assert (found.config, found.base, found.conditions) == (net.config, net.base, net.conditions)
    one, other = (generators.predict(own, BASE, text(), seed=3).lora for own in (net, found))
    assert all(torch.equal(one.delta(name), other.delta(name)) for name in one)
    save_lora_diffusion(net, path, dtype=torch.float16)
    half = load_generator(path, dtype=None)
    assert half.latent_mean.dtype == torch.float16
    other = generators.predict(half, BASE, text(), seed=3).lora
    assert half.latent_mean.dtype == torch.float16
    assert all(torch.allclose(one.delta(n), other.delta(n), atol=0.3) for n in one)
    save_hypernetwork(network(), tmp_path / "hyper.safetensors")
    assert isinstance(load_generator(tmp_path / "hyper.safetensors"), Hypernetwork)
    facts = dict(inspect(path).facts)
    assert (
        "LoRA Diffusion" in inspect(path).kind
        and facts["layout"] == "LoFA's own, VAE and diffusion in one file"
    )


def first_gone(tensors):
    del tensors[sorted(tensors)[0]]


def test_damaged_and_foreign_files_are_named(saved):
    _, path = saved
    with pytest.raises(ValueError, match=f"net.safetensors: not a LoFA hypernetwork .*{DIFFUSION_FORMAT}"):
        load_hypernetwork(path)
    rewrite(path, change_header=lambda header: header["config"].update(target="epsilon"))
    with pytest.raises(ValueError, match="net.safetensors: its LoFA header is damaged .*'epsilon'"):
        load_generator(path)
    rewrite(path, first_gone, lambda header: header["config"].update(target="v"))
    with pytest.raises(ValueError, match="do not fit its header .1 missing, first"):
        load_generator(path)
    rewrite(path, change_metadata=lambda metadata: metadata.update(format="another"))
    with pytest.raises(ValueError, match="not a LoFA hypernetwork .*'another'"):
        load_generator(path)


def test_what_does_not_fit_is_refused_and_response_maps_are_not_there():
    with pytest.raises(ValueError, match="conditioned on text, not on style"):
        generators.predict(small(), BASE, {"style": Given(torch.ones(1, 2, 7))})
    with pytest.raises(ValueError, match="predicts LoRAs for WAN2.1 miniature"):
        generators.predict(small(), BaseWeights.from_tensors(base_tensors(side=32)), text())
    with pytest.raises(ValueError, match="LoRA Diffusion: it predicts no response maps"):
        generators.predict_response(small(), BASE, text())
    drawn = generators.predict(small(), BASE, text())
    assert len(drawn.responses) == 0
    with pytest.raises(ValueError, match="no response map.*LoRA Diffusion has none.*Response from LoRA"):
        render(drawn.responses)


def test_a_hypernetwork_goes_through_the_same_door_unchanged_whatever_the_seed():
    net = network(config=CONFIG)
    one, other = (generators.predict(net, BASE, text(), seed=seed) for seed in (0, 7))
    assert all(torch.equal(one.lora.delta(name), other.lora.delta(name)) for name in one.lora)
    assert len(one.responses) == 16 and len(generators.predict_response(net, BASE, text())) == 16


def test_the_command_line_draws_with_a_seed(saved, tmp_path, capsys):
    _, path = saved
    from safetensors.torch import save_file

    save_file(base_tensors(), tmp_path / "base.safetensors")
    save_file({"text_emb": text()["text"].values}, tmp_path / "condition.safetensors")
    line = ["predict", "--hypernetwork", str(path), "--base", str(tmp_path / "base.safetensors")]
    line += [
        "--condition",
        str(tmp_path / "condition.safetensors"),
        "--out",
        str(tmp_path / "lora.safetensors"),
    ]
    assert main([*line, "--seed", "5"]) == 0
    assert dict(inspect(tmp_path / "lora.safetensors").facts)["seed"] == "5"
    assert main([*line, "--heatmap", str(tmp_path / "map.png")]) == 2
    assert "predicts no response maps" in capsys.readouterr().err
    assert not (tmp_path / "map.png").exists()
