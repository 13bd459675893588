"""Writes what the workflows for WAN and SDXL load, small and with random weights.

Run by `Installation.inspect`: python small_models.py <ComfyUI checkout> <this repository> <models folder> -

The architectures are ComfyUI's own, found by its own detection (with small_sizes.py's entries). The WAN
model and its VAE are the miniature's, and so is the text encoder, its tokeniser in the file as ComfyUI's.
"""

import json
import sys
from pathlib import Path

from in_comfyui import PROMPT, load_pack  # makes ComfyUI importable, and takes this folder's place

import comfy.clip_vision  # isort: skip
import comfy.supported_models
import comfy.taesd.taesd
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
import small_sizes  # noqa: E402

MODELS = Path(PROMPT)
# SDPose with two of its four widths; its heatmap head wants 640 channels.
SDPOSE = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1, "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "context_dim": 1024, "adm_in_channels": 4, "use_temporal_attention": False, "heatmap_head": True,
}  # fmt: skip
SDXL = small_sizes.SmallSDXL.unet_config | {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1, "use_spatial_transformer": True, "num_classes": "sequential",
}  # fmt: skip


def drawn(state: dict) -> dict:
    """Random weights in place of those of a state dict, in half precision and of sane size."""
    draw, found = torch.Generator().manual_seed(7), {}
    for name, old in state.items():
        if not old.is_floating_point() or old.ndim == 0:
            found[name] = old.clone()
            continue
        scale = old[0].numel() ** -0.5 if old.ndim > 1 else 0.1
        centre = 1.0 if old.ndim == 1 and name.endswith("weight") else 0.0
        found[name] = (centre + scale * torch.randn(old.shape, generator=draw)).half()
    return found


def checkpoint(config, clip=None) -> dict:
    """UNet, text encoders and a tiny VAE under a checkpoint's keys."""
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", torch.device("cpu"))
    unet = config.process_unet_state_dict_for_saving(drawn(model.diffusion_model.state_dict()))
    vae = config.process_vae_state_dict_for_saving(drawn(comfy.taesd.taesd.TAESD().state_dict()))
    text = config.process_clip_state_dict_for_saving(drawn(clip.state_dict())) if clip else {}
    return {key: value.contiguous() for key, value in (unet | vae | text).items()}


def write(state: dict, place: str, metadata: dict | None = None) -> int:
    file = MODELS / place
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata=metadata)
    return file.stat().st_size


def main() -> dict:
    load_pack()
    from lofa_pack.lofa_core import miniature

    sdxl = comfy.supported_models.LotusD(dict(SDPOSE))
    sizes = {"sdpose": write(checkpoint(sdxl), "checkpoints/sdpose_wholebody_fp16.safetensors")}
    small = checkpoint(small_sizes.SmallSDXL(dict(SDXL)), small_sizes.SmallSDXLClip(dtype=torch.float32))
    sizes["sdxl"] = write(small, "checkpoints/sd_xl_base_1.0.safetensors")

    config = Path(comfy.clip_vision.__file__).with_name("clip_vision_config_vitl.json")
    seen = comfy.clip_vision.ClipVisionModel(json.loads(config.read_text())).get_sd()
    sizes["clip"] = write(drawn(seen), "clip_vision/clip-vit-large-patch14.safetensors")

    text = load_file(miniature.TEXT_ENCODER)
    vocabulary = torch.frombuffer(bytearray(miniature.TOKENIZER.read_bytes()), dtype=torch.uint8)
    own = json.loads(miniature.TEXT_ENCODER_CONFIG.read_text(encoding="utf-8"))
    named = {key: own[key] for key in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")}
    metadata = {small_sizes.SIZES: json.dumps(named)}
    place = "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    sizes["umt5"] = write(text | {"spiece_model": vocabulary}, place, metadata)
    return sizes


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main()) + "\n")
