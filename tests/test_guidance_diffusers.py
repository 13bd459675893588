"""HM-CFG in diffusers' pipelines, against a truth by hand from two models loaded apart."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, StableDiffusionXLPipeline
from tiny import generator
from tiny_sdxl import write_sdxl
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lofa_core import miniature
from lofa_core.base_models import BaseWeights
from lofa_core.guidance import HybridGuidance
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import save_lora
from training import backbones
from training.denoisers import SDXLDenoiser, WanDenoiser
from training.guidance import _as_rows, sample

PROMPT, NEGATIVE, STEPS = "a person waves", "a person jumps", 4
STRENGTH = 0.7  # of the LoRA: what is reset is not 1


def some_lora(model):
    """Over every target layer of a diffusers model, with alpha other than r."""
    draw = generator(1)
    base = BaseWeights.from_tensors(model.state_dict()).model
    return LoRA(
        {
            layer.name: LoRALayer(
                0.3 * torch.randn(2, layer.shape[1], generator=draw),
                0.3 * torch.randn(layer.shape[0], 2, generator=draw),
                1.5,
            )
            for layer in base.layers
        }
    )


def sdxl_pipeline(folder, scheduler=EulerDiscreteScheduler):
    parts = {
        f"{part}{suffix}": kind.from_pretrained(folder / f"{part}{suffix}")
        for part, suffix, kind in (
            ("text_encoder", "", CLIPTextModel),
            ("text_encoder", "_2", CLIPTextModelWithProjection),
            ("tokenizer", "", CLIPTokenizer),
            ("tokenizer", "_2", CLIPTokenizer),
        )
    }
    pipeline = StableDiffusionXLPipeline(
        vae=backbones.load_image_vae(folder),
        unet=backbones.load_unet(folder),
        scheduler=scheduler.from_pretrained(folder / "scheduler"),
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wan_pipeline():
    pipeline = backbones.load_pipeline(miniature.FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def merge(denoiser, lora):
    """The personalised model, its weights changed for good."""
    with torch.no_grad():
        for name, module in denoiser.modules(list(lora)).items():
            module.weight += STRENGTH * lora.delta(name)


class Wan:
    """The miniature: the pipeline with the LoRA loaded, and the base and the personalised model beside it."""

    arguments = {"height": 64, "width": 64, "num_frames": 5}
    shape = (2, 16, 2, 8, 8)

    def __init__(self, folder):
        self.pipeline, self.apart = wan_pipeline(), wan_pipeline()
        self.model, self.base = self.pipeline.transformer, self.apart.transformer
        self.personalised = backbones.load_transformer(miniature.FOLDER)
        lora = some_lora(self.base)
        merge(WanDenoiser(self.personalised), lora)
        save_lora(lora, folder / "wan.safetensors")
        self.pipeline.load_lora_weights(str(folder / "wan.safetensors"), adapter_name="subject")

    def predict(self, model, x, t, prompt):
        states = self.apart.encode_prompt([prompt] * 2, do_classifier_free_guidance=False)[0]
        states = torch.nn.functional.pad(states, (0, 0, 0, 512 - states.shape[1]))
        return model(x, t.expand(2), states, return_dict=False)[0]


class Sdxl:
    """The toy SDXL, likewise."""

    arguments = {"height": 16, "width": 16}
    shape = (2, 4, 8, 8)
    scheduler = EulerDiscreteScheduler

    def __init__(self, folder):
        write_sdxl(folder)
        self.pipeline, self.apart = (sdxl_pipeline(folder, self.scheduler) for _ in range(2))
        self.model, self.base = self.pipeline.unet, self.apart.unet
        self.personalised = backbones.load_unet(folder)
        lora = some_lora(self.base)
        merge(SDXLDenoiser(self.personalised, backbones.load_noise_schedule(folder), 2), lora)
        save_lora(lora, folder / "sdxl.safetensors")
        self.pipeline.load_lora_weights(str(folder / "sdxl.safetensors"), adapter_name="subject")

    def predict(self, model, x, t, prompt):
        states, _, pooled, _ = self.apart.encode_prompt([prompt] * 2, do_classifier_free_guidance=False)
        sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 2)
        added = {"text_embeds": pooled, "time_ids": sizes}
        x = self.apart.scheduler.scale_model_input(x, t)
        return model(x, t, states, added_cond_kwargs=added, return_dict=False)[0]


class SdxlHeun(Sdxl):
    """With a scheduler that asks twice a step."""

    scheduler = HeunDiscreteScheduler


def truth(family, noise, weights):
    """Sampled by hand: weights of each level of noise, in order -> latents."""
    scheduler = family.apart.scheduler
    scheduler.set_timesteps(STEPS)
    x, levels = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise, []
    for t in scheduler.timesteps:
        levels += [t] if t not in levels else []
        w_base, w_subject = weights[levels.index(t)]
        negative = family.predict(family.base, x, t, NEGATIVE)
        base = family.predict(family.base, x, t, PROMPT)
        personalised = family.predict(family.personalised, x, t, PROMPT)
        eps = negative + w_base * (base - negative) + w_subject * (personalised - base)
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return x


def ours(family, noise, guidance, **more):
    prompts = {"prompt": [PROMPT] * 2, "negative_prompt": [NEGATIVE] * 2} | more
    return sample(
        family.pipeline, guidance=guidance, adapter="subject", num_inference_steps=STEPS,
        output_type="latent", latents=noise.clone(), return_dict=False, **prompts, **family.arguments,
    )[0]  # fmt: skip


def scalings(model):
    return [m.scaling["subject"] for m in model.modules() if hasattr(m, "scaling")]


@pytest.fixture(scope="module", params=[Wan, Sdxl, SdxlHeun])
def family(request, tmp_path_factory):
    made = request.param(tmp_path_factory.mktemp(request.param.__name__))
    made.pipeline.set_adapters("subject", STRENGTH)
    return made


@pytest.fixture
def noise(family):
    return torch.randn(family.shape, generator=generator(5))


@pytest.mark.parametrize(
    ("guidance", "weights"),
    [
        (HybridGuidance(4.0, 2.5), [(4.0, 2.5)] * 4),
        (
            HybridGuidance(4.0, 2.5, base_window=(0.5, 1.0), subject_window=(0.0, 0.75)),
            [(1.0, 2.5), (1.0, 2.5), (4.0, 2.5), (4.0, 0.0)],
        ),
    ],
    ids=["always", "windows"],
)
@torch.no_grad()
def test_guided_samples_are_those_of_two_models_loaded_apart(family, noise, guidance, weights):
    expected = truth(family, noise, weights)
    found = ours(family, noise, guidance)
    size = expected.abs().max()
    assert (found - expected).abs().max() < 1e-3 * size
    for wrong in ([(4.0, 4.0)] * 4, [(4.0, 0.0)] * 4):
        assert (truth(family, noise, wrong) - expected).abs().max() > 0.02 * size


def test_without_subject_it_is_the_base_pipelines_own_cfg(family, noise):
    found = ours(family, noise, HybridGuidance(4.0, 0.0))
    plain = family.apart(
        [PROMPT] * 2, negative_prompt=[NEGATIVE] * 2, guidance_scale=4.0, num_inference_steps=STEPS,
        output_type="latent", latents=noise.clone(), return_dict=False, **family.arguments,
    )[0]  # fmt: skip
    assert (found - plain).abs().max() < 1e-4 * plain.abs().max()


def test_several_pictures_of_one_prompt(family, noise):
    count = "num_images_per_prompt" if isinstance(family, Sdxl) else "num_videos_per_prompt"
    guidance = HybridGuidance(4.0, 2.5)
    one = {"prompt": PROMPT, "negative_prompt": NEGATIVE, count: 2}
    assert torch.allclose(ours(family, noise, guidance, **one), ours(family, noise, guidance), atol=1e-4)


def test_each_negative_stands_beside_the_pictures_of_its_own_prompt():
    negative = torch.tensor([[1.0], [2.0]])
    assert _as_rows({"states": torch.zeros(4, 1)}, "states", negative)["states"].tolist() == [
        [1.0], [1.0], [2.0], [2.0]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("guidance", "passes"),
    [(HybridGuidance(4.0, 2.0), 3), (HybridGuidance(4.0, 4.0), 2), (HybridGuidance(1.0, 1.0), 1),
     (HybridGuidance(4.0, 2.0, (0.0, 0.5), (0.5, 1.0)), 2)],
)  # fmt: skip
def test_passes_that_change_nothing_are_not_made(family, noise, guidance, passes):
    made = []
    # Within forward, so that it sees every pass: hooks on the whole model see one a step.
    last = [m for m in family.model.modules() if not list(m.children())][-1]
    handle = last.register_forward_hook(lambda *_: made.append(1))
    try:
        ours(family, noise, guidance)
    finally:
        handle.remove()
    assert len(made) == passes * len(family.pipeline.scheduler.timesteps)


@torch.no_grad()
def test_the_pipeline_is_left_as_it_was_even_after_an_error(family, noise):
    before = {key: tensor.clone() for key, tensor in family.model.state_dict().items()}
    scales = scalings(family.model)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours(family, noise, HybridGuidance(4.0, 2.5), callback_on_step_end=stop)
    assert scalings(family.model) == scales and "forward" not in vars(family.model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in family.model.state_dict().items())


@torch.no_grad()
def test_an_error_within_a_base_pass_leaves_the_lora_on(family, noise):
    scales = scalings(family.model)

    def fail(*_):
        assert set(scalings(family.model)) == {0.0}
        raise KeyboardInterrupt

    last = [m for m in family.model.modules() if not list(m.children())][-1]
    handle = last.register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            ours(family, noise, HybridGuidance(4.0, 2.5))
    finally:
        handle.remove()
    assert scalings(family.model) == scales and 0.0 not in scales


def test_what_cannot_be_switched_is_refused(family, noise):
    guidance, arguments = HybridGuidance(), {"prompt": PROMPT, "negative_prompt": ""}
    with pytest.raises(ValueError, match=r"loaded as 'other' \(loaded: subject\)"):
        sample(family.pipeline, guidance=guidance, adapter="other", **arguments)
    with pytest.raises(ValueError, match=r"loaded as 'subject' \(loaded: none\)"):
        sample(family.apart, guidance=guidance, adapter="subject", **arguments)
    family.pipeline.disable_lora()
    try:
        with pytest.raises(ValueError, match="switched off"):
            sample(family.pipeline, guidance=guidance, adapter="subject", **arguments)
    finally:
        family.pipeline.enable_lora()
    with pytest.raises(ValueError, match="object: HM-CFG samples WanPipeline"):
        sample(object(), guidance=guidance, adapter="subject", **arguments)
