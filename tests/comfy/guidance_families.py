"""The miniature and a toy SDXL in ComfyUI for the tests of HM-CFG, and the truth: two models loaded apart."""

import functools

from in_comfyui import load_pack  # makes ComfyUI importable

import comfy.model_management  # isort: skip
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file

STEPS, SEED, STRENGTH = 4, 11, 0.7
WEIGHTS = (4.0, 2.5)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Family:
    """A base model that can be loaded anew, with or without a LoRA in its weights for good."""

    def __init__(self, host):
        from lofa_pack.lofa_core.lora import LoRA, LoRALayer
        from lofa_pack.lofa_core.lora_files import to_state_dict

        self.base = host.base_weights(self.load())
        self.container = LoRA(
            {
                layer.name: LoRALayer(
                    0.2 * draw(place, 2, layer.shape[1]), 0.2 * draw(99 + place, layer.shape[0], 2), 1.5
                )
                for place, layer in enumerate(self.base.model.layers)
            }
        )
        self.lora = to_state_dict(self.container)
        self.noise = draw(5, *self.shape)

    def personalised(self, strength=STRENGTH):
        """Loaded apart, and its weights changed without any of ComfyUI's ways to apply a LoRA."""
        model = self.load()
        for layer in self.base.model.layers:
            weight = model.model.get_parameter(layer.key)
            weight.data += strength * self.container.delta(layer.name)
        return model

    def sigmas(self, model):
        return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)

    def sample(self, guider, sampler="euler"):
        return guider.sample(
            self.noise.clone(), torch.zeros(self.shape), comfy.samplers.sampler_object(sampler),
            self.sigmas(guider.model_patcher), disable_pbar=True, seed=SEED,
        )  # fmt: skip

    def ksample(self, model, cfg, sampler="euler"):
        return comfy.sample.sample(
            model, self.noise.clone(), STEPS, cfg, sampler, "simple", self.positive, self.negative,
            torch.zeros(self.shape), disable_pbar=True, seed=SEED,
        )  # fmt: skip

    def guider(self, model, weights=WEIGHTS, strength=STRENGTH, **windows):
        from lofa_pack.lofa_core.guidance import HybridGuidance
        from lofa_pack.nodes import host_guidance

        guidance = HybridGuidance(*weights, **windows)
        return host_guidance.hybrid_guider(model, self.lora, strength, guidance, self.positive, self.negative)

    def patched(self, model, subject=WEIGHTS[1], **windows):
        from lofa_pack.lofa_core.guidance import HybridGuidance
        from lofa_pack.nodes import host_guidance

        guidance = HybridGuidance(w_subject=subject, **windows)
        return host_guidance.hybrid_model(model, self.lora, STRENGTH, guidance)

    @functools.cached_property
    def truth(self):
        """What a guider over two models apart samples."""
        return self.sample(self.apart())

    @functools.cached_property
    def plain(self):
        """What a model samples that never met HM-CFG."""
        return self.ksample(self.load(), 4.0)

    def apart(self, weights=lambda step: WEIGHTS, strength=STRENGTH):
        """The truth: a guider over a base model and a personalised model that share nothing."""
        return Apart(self, self.load(), self.personalised(strength), weights)


class Wan(Family):
    """The miniature."""

    shape = (1, 16, 2, 8, 8)
    positive = [[draw(1, 1, 7, 64), {}]]
    negative = [[draw(2, 1, 5, 64), {}]]

    def load(self):
        from lofa_pack.lofa_core import miniature

        with safe_open(miniature.DIFFUSION_MODEL, "pt") as file:
            metadata = file.metadata()
        return comfy.sd.load_diffusion_model_state_dict(
            load_file(miniature.DIFFUSION_MODEL),
            model_options={"dtype": torch.float32},
            metadata=metadata,
        )


class Sdxl(Family):
    """SDXL with a tenth of the channels and weights at random."""

    shape = (1, 4, 8, 8)
    positive = [[draw(1, 1, 6, 24), {"pooled_output": draw(3, 1, 8)}]]
    negative = [[draw(2, 1, 6, 24), {"pooled_output": draw(4, 1, 8)}]]

    def load(self):
        unet = {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
            "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 1, 1, 1, 1],
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1], "transformer_depth_middle": 1,
            "use_spatial_transformer": True, "use_linear_in_transformer": True, "context_dim": 24,
            "num_head_channels": 16, "num_classes": "sequential", "adm_in_channels": 8 + 6 * 256,
            "use_temporal_attention": False, "dtype": torch.float32,
        }  # fmt: skip
        config = comfy.supported_models.SDXL(unet)
        config.set_inference_dtype(torch.float32, None)
        device = torch.device("cpu")
        model = config.get_model({}, "", device)
        drawn = torch.Generator().manual_seed(7)
        for name, weight in model.diffusion_model.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            centre = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0
            weight.data = centre + scale * torch.randn(weight.shape, generator=drawn)
            weight.requires_grad_(False)
        return comfy.model_patcher.ModelPatcher(model, device, device)


class Apart(comfy.samplers.CFGGuider):
    """The formula by hand, over two models; `weights` gives w_base and w_subject of each step."""

    def __init__(self, family, base, personalised, weights):
        super().__init__(base)
        self.other, self.weights = personalised, weights
        self.set_conds(family.positive, family.negative)
        self.set_cfg(weights(0)[0])
        comfy.model_management.load_models_gpu([personalised])
        personalised.pre_run()

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        def ask(model, cond):
            return comfy.samplers.calc_cond_batch(model, [cond], x, timestep, model_options)[0]

        sigmas = model_options["transformer_options"]["sample_sigmas"]
        w_base, w_subject = self.weights(int((sigmas[:-1] >= 0.9999 * timestep.max()).sum()) - 1)
        negative = ask(self.inner_model, self.conds["negative"])
        base = ask(self.inner_model, self.conds["positive"])
        personalised = ask(self.other.model, self.conds["positive"])
        result = negative + w_base * (base - negative) + w_subject * (personalised - base)
        for hook in model_options.get("sampler_post_cfg_function", []):  # of the CFG++ samplers
            result = hook({"denoised": result, "uncond_denoised": negative, "cond_denoised": base})
        return result


def distance(found, truth) -> float:
    """Largest difference against the truth's largest value; infinite where one is not finite."""
    if not (found.isfinite().all() and truth.isfinite().all()):
        return float("inf")
    return ((found - truth).abs().max() / truth.abs().max()).item()


def families() -> dict[str, Family]:
    host = load_pack()
    return {"wan": Wan(host), "sdxl": Sdxl(host)}
