"""What HM-CFG touches of ComfyUI's internals: the LoRA is in the model during the personalised pass only.

A LoRA as ComfyUI usually applies it changes weights that all clones of a MODEL share, so two models in one
sampler would both have it. Here its layers are bypassed (comfy.weight_adapter.bypass) for one pass at a time,
and no weight is changed.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter.bypass import BypassForwardHook
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ..lofa_core.guidance import HybridGuidance, Prediction, coefficients, guide, progress

_KEY = "lofa_hm_cfg"
# A MODEL has one of each, and HM-CFG needs both. The other hooks (pre- and post-CFG) go on working.
_OWN_HOOKS = ("sampler_calc_cond_batch_function", "sampler_cfg_function")


def hybrid_guider(
    model: comfy.model_patcher.ModelPatcher,
    lora: Mapping[str, Tensor],
    strength: float,
    guidance: HybridGuidance,
    positive: Sequence,
    negative: Sequence,
) -> comfy.samplers.CFGGuider:
    """ComfyUI's own CFG guider over `hybrid_model`, with w_base as its cfg. Raises as `hybrid_model`."""
    guider = comfy.samplers.CFGGuider(hybrid_model(model, lora, strength, guidance))
    guider.set_conds(positive, negative)
    guider.set_cfg(guidance.w_base)
    return guider


def hybrid_model(
    model: comfy.model_patcher.ModelPatcher,
    lora: Mapping[str, Tensor],
    strength: float,
    guidance: HybridGuidance,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the MODEL that samplers guide with HM-CFG; w_base is the sampler's cfg, not `guidance`'s.

    Raises ValueError where the LoRA does not fit, is not an ordinary one, or the MODEL has HM-CFG already.
    """
    if model.get_wrappers(WrappersMP.PREDICT_NOISE, _KEY):
        raise ValueError("This MODEL has HM-CFG already, which takes one LoRA. Connect it before that node.")
    if not strength:
        guidance = replace(guidance, w_subject=0.0)  # a pass with the LoRA would change nothing
    clone = model.clone()
    passes = HybridPasses(_adapters(model, lora), strength, guidance)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _KEY, passes)
    return clone


def _adapters(model: comfy.model_patcher.ModelPatcher, lora: Mapping[str, Tensor]) -> dict[str, LoRAAdapter]:
    """Module name -> the LoRA's adapter for it."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    found = comfy.lora.load_lora(lora, keys, log_missing=False)
    adapters = {}
    for key, adapter in found.items():
        plain = isinstance(key, str) and isinstance(adapter, LoRAAdapter)
        # Its last two weights are DoRA's and a change of shape, which the bypass passes over.
        if not plain or any(part is not None for part in adapter.weights[4:]):
            raise ValueError(f"HM-CFG takes ordinary LoRAs; what this one has for {key} is of another kind.")
        adapters[key.removesuffix(".weight")] = adapter
    used = {key for adapter in adapters.values() for key in adapter.loaded_keys}
    left = [key for key in lora if key not in used]
    if left or not adapters:
        raise ValueError(
            f"{len(left)} of the LoRA's {len(lora)} tensors match no layer of this MODEL"
            f"{f' (first {left[0]})' if left else ''}. Use a LoRA made for the same base model."
        )
    for name, adapter in adapters.items():
        module = model.model.get_submodule(name)
        if isinstance(module, torch.nn.Linear):
            up, down, *_ = adapter.weights
            given, own = [up.shape[0], down.shape[1]], [module.out_features, module.in_features]
            if given != own:
                raise ValueError(
                    f"{name} is {own} in this MODEL, and the LoRA changes a layer of {given}. "
                    "Use a LoRA made for the same base model."
                )
    return adapters


class HybridPasses:
    """Around a guider's prediction of one step: passes without and with the LoRA, joined by HM-CFG."""

    def __init__(self, adapters: Mapping[str, LoRAAdapter], strength: float, guidance: HybridGuidance):
        self.adapters, self.strength, self.guidance = adapters, strength, guidance

    def to(self, target: torch.device | torch.dtype) -> "HybridPasses":
        """ComfyUI calls this before and after sampling, with a device and with the model's dtype.

        The dtype is left alone: a quantised model's is too coarse for a LoRA.
        """
        if isinstance(target, torch.device):
            for adapter in self.adapters.values():
                adapter.weights = tuple(
                    part.to(target) if isinstance(part, Tensor) else part for part in adapter.weights
                )
        return self

    def __call__(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed=None) -> Tensor:
        guider = executor.class_obj
        _check(guider, model_options)
        sigmas = model_options["transformer_options"]["sample_sigmas"][:-1].tolist()
        guidance = replace(self.guidance, w_base=guider.cfg)
        weights = guidance.at(progress(timestep.max().item(), sigmas))
        needed = set(coefficients(*weights))
        if model_options.get("disable_cfg1_optimization"):
            needed.add(Prediction.NEGATIVE)  # another node's hook wants to see it
        # A copy of the model on a second GPU would not have the LoRA.
        options = {key: value for key, value in model_options.items() if key != "multigpu_clones"}
        personalised = {}

        def predict(args: dict) -> list[Tensor]:
            model = args["model"]

            def ask(conds: list) -> list[Tensor]:
                return comfy.samplers.calc_cond_batch(model, conds, x, timestep, options)

            positive, negative = guider.conds["positive"], guider.conds.get("negative")
            base = ask(
                [
                    positive if Prediction.BASE in needed else None,
                    negative if Prediction.NEGATIVE in needed else None,
                ]
            )
            if Prediction.PERSONALISED in needed:
                with self._injected(model):
                    personalised[Prediction.PERSONALISED] = ask([_named_apart(positive), None])[0]
                if Prediction.BASE not in needed:
                    base[0] = personalised[Prediction.PERSONALISED]
            return base

        def join(args: dict) -> Tensor:
            base = {
                Prediction.NEGATIVE: args["uncond_denoised"],
                Prediction.BASE: args["cond_denoised"],
            }
            return x - guide(base | personalised, *weights)

        own = dict(zip(_OWN_HOOKS, (predict, join), strict=True))
        return executor(x, timestep, options | own, seed)

    @contextmanager
    def _injected(self, model: comfy.model_base.BaseModel) -> Iterator[None]:
        """Within the context the model has the LoRA. The model is the one that runs: ComfyUI may have swapped
        the clone's for another since the node made it.
        """
        hooks = [
            BypassForwardHook(model.get_submodule(name), adapter, self.strength)
            for name, adapter in self.adapters.items()
        ]
        try:
            for hook in hooks:
                hook.inject()
            yield
        finally:
            for hook in hooks:
                hook.eject()


def _check(guider: comfy.samplers.CFGGuider, model_options: Mapping[str, object]) -> None:
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        raise ValueError(
            f"{type(guider).__name__} combines predictions in its own way, and so does HM-CFG. "
            "Sample this MODEL with KSampler, SamplerCustom or CFG Guider."
        )
    taken = [hook for hook in _OWN_HOOKS if hook in model_options]
    if taken:
        raise ValueError(
            f"Another node on this MODEL replaces CFG ({', '.join(taken)}), as Rescale CFG does; HM-CFG "
            "replaces it too. Remove one of them."
        )


def _named_apart(conds: Sequence[dict]) -> list[dict]:
    """The same conditions for the personalised model: nodes that reuse predictions tell by the uuid."""
    return [{**cond, "uuid": uuid.uuid5(cond["uuid"], _KEY)} for cond in conds]
