"""HM-CFG in diffusers' pipelines: both models' predictions from one model with its LoRA switched.

diffusers' step callbacks come after the step, and its guiders are for modular pipelines only. So the pipeline
runs unguided, once a step under the prompt, and the denoiser's answer is already the guided one.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import StableDiffusionXLPipeline, WanPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lofa_core.guidance import HybridGuidance, Prediction, coefficients, guide, progress

_WAN_TOKENS = 512  # as WanPipeline's own default; its encode_prompt has another


def sample(
    pipeline: WanPipeline | StableDiffusionXLPipeline,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    guidance: HybridGuidance,
    adapter: str,
    **arguments: object,
):
    """What the pipeline returns for the prompt and its other `arguments`, guided by HM-CFG.

    `adapter` names the LoRA that personalises, as given to `pipeline.load_lora_weights(file, adapter_name=)`;
    its strength is `pipeline.set_adapters`'s. Other adapters count as part of the base. Whatever happens, the
    pipeline is left as it was. Raises ValueError where the pipeline is of another kind or the adapter is not
    loaded, off or fused.
    """
    model = _denoiser(pipeline)
    layers = _layers(model, adapter)
    scales = [layer.scaling[adapter] for layer in layers]
    positive, negative = _encoded(pipeline, prompt, negative_prompt)
    forward, own = model.forward, vars(model).get("forward")
    signature = inspect.signature(forward)

    def switch(on: bool) -> None:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[adapter] = scale if on else 0.0

    def guided(*args: object, **kwargs: object) -> tuple[Tensor]:
        asked = signature.bind(*args, **kwargs).arguments
        now = torch.as_tensor(asked["timestep"]).flatten()[0].item()
        weights = guidance.at(progress(now, pipeline.scheduler.timesteps.tolist()))
        predictions = {}
        for prediction in coefficients(*weights):
            switch(prediction is Prediction.PERSONALISED)
            changed = negative(asked) if prediction is Prediction.NEGATIVE else {}
            predictions[prediction] = forward(**asked | changed)[0]
        return (guide(predictions, *weights),)

    model.forward = guided
    try:
        return pipeline(**positive, guidance_scale=1.0, **arguments)
    finally:
        switch(True)
        if own is None:
            del model.forward
        else:
            model.forward = own  # a hook of accelerate's


def _denoiser(pipeline) -> nn.Module:
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return pipeline.unet
    if isinstance(pipeline, WanPipeline) and pipeline.transformer_2 is None:
        return pipeline.transformer
    raise ValueError(
        f"{type(pipeline).__name__}: HM-CFG samples WanPipeline (WAN2.1, one transformer) and "
        "StableDiffusionXLPipeline."
    )


def _layers(model: nn.Module, adapter: str) -> list[LoraLayer]:
    every = [module for module in model.modules() if isinstance(module, LoraLayer)]
    layers = [layer for layer in every if adapter in layer.scaling]
    if not layers:
        loaded = sorted({name for layer in every for name in layer.scaling}) or ["none"]
        raise ValueError(
            f"No LoRA is loaded as {adapter!r} (loaded: {', '.join(loaded)}). "
            "Load it with pipeline.load_lora_weights(file, adapter_name=...)."
        )
    if any(x.merged or x.disable_adapters or adapter not in x.active_adapters for x in layers):
        raise ValueError(
            f"The LoRA {adapter!r} is fused into the weights or switched off; HM-CFG switches it itself. "
            "Unfuse it with pipeline.unfuse_lora(), or activate it with pipeline.set_adapters(...)."
        )
    return layers


def _encoded(pipeline, prompt, negative_prompt) -> tuple[dict[str, Tensor], Callable[[dict], dict]]:
    """The pipeline's arguments for the prompt, and what the denoiser is given instead under the negative."""
    if isinstance(pipeline, WanPipeline):
        states, negative = pipeline.encode_prompt(prompt, negative_prompt, max_sequence_length=_WAN_TOKENS)
        return {"prompt_embeds": states}, lambda asked: _as_rows(asked, "encoder_hidden_states", negative)
    states, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompt, negative_prompt=negative_prompt
    )

    def under_the_negative(asked: dict) -> dict:
        added = asked["added_cond_kwargs"]
        return _as_rows(asked, "encoder_hidden_states", negative) | {
            "added_cond_kwargs": added | _as_rows(added, "text_embeds", negative_pooled)
        }

    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}, under_the_negative


def _as_rows(asked: dict, name: str, negative: Tensor) -> dict[str, Tensor]:
    """The negative prompts as argument `name`: each as often as the pipeline repeats its prompt."""
    times = len(asked[name]) // len(negative)
    return {name: negative.to(asked[name]).repeat_interleave(times, 0)}
