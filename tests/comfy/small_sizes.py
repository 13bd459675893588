"""A custom node for the tests' ComfyUI, without nodes: SDXL and UMT5 in small sizes are known to its loaders.

ComfyUI tells SDXL by its widths and has UMT5's sizes in a table; here both get one more entry. Everything
else (which file is what, how it is read, the model's code) is ComfyUI's own.
"""

import json

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
from comfy.supported_models_base import ClipTarget
from safetensors import safe_open

WIDTHS = {"clip_l": 8, "clip_g": 16}
SIZES = "umt5xxl_model_config"  # in a UMT5 file's metadata, as in ComfyUI's model options


def _text_encoder(width: int) -> dict:
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 2,
        "num_hidden_layers": 3, "projection_dim": width,
    }  # fmt: skip


class SmallSDXLClip(comfy.sdxl_clip.SDXLClipModel):
    """SDXL's two text encoders, 8 and 16 wide."""

    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        sizes = {f"{name}_model_config": _text_encoder(width) for name, width in WIDTHS.items()}
        super().__init__(device, dtype, model_options | sizes)


class SmallSDXL(comfy.supported_models.SDXL):
    """SDXL with a tenth of the channels and one transformer block at each place."""

    unet_config = comfy.supported_models.SDXL.unet_config | {
        "model_channels": 32,
        "transformer_depth": [0, 0, 1, 1, 1, 1],
        "context_dim": sum(WIDTHS.values()),
        "adm_in_channels": WIDTHS["clip_g"] + 6 * 256,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 16}

    def clip_target(self, state_dict={}):  # noqa: B006
        return ClipTarget(comfy.sdxl_clip.SDXLTokenizer, SmallSDXLClip)


def _load_clip(ckpt_paths, *more, model_options={}, **named):  # noqa: B006
    with safe_open(ckpt_paths[0], "pt") as file:
        sizes = (file.metadata() or {}).get(SIZES)
    if sizes:
        model_options = model_options | {SIZES: json.loads(sizes)}
    return _cores_load_clip(ckpt_paths, *more, model_options=model_options, **named)


def _detect_te_model(state):
    return comfy.sd.TEModel.T5_XXL if "spiece_model" in state else _cores_detect_te_model(state)


comfy.supported_models.models.append(SmallSDXL)
_cores_load_clip, comfy.sd.load_clip = comfy.sd.load_clip, _load_clip
_cores_detect_te_model, comfy.sd.detect_te_model = comfy.sd.detect_te_model, _detect_te_model

NODE_CLASS_MAPPINGS = {}
