"""The embedded base model as ComfyUI's own objects, by ComfyUI's own loaders."""

import json

import comfy.clip_vision
import comfy.model_patcher
import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import torch

from ..lofa_core import miniature

# All in float32: at this size speed does not matter, and the hypernetwork was trained on float32 weights.
_MINIATURE_DTYPE = torch.float32


def load_miniature() -> tuple[
    comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE, comfy.clip_vision.ClipVisionModel
]:
    """The embedded base model as ComfyUI's own MODEL, CLIP, VAE and CLIP_VISION."""
    model = comfy.sd.load_diffusion_model(
        str(miniature.DIFFUSION_MODEL), model_options={"dtype": _MINIATURE_DTYPE}
    )
    return model, _load_text_encoder(), _load_vae(), _load_image_encoder()


def _load_vae() -> comfy.sd.VAE:
    state, metadata = comfy.utils.load_torch_file(str(miniature.VAE), return_metadata=True)
    vae = comfy.sd.VAE(sd=state, metadata=metadata, dtype=_MINIATURE_DTYPE)
    vae.throw_exception_if_invalid()
    # How ComfyUI makes a second copy on another device.
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (str(miniature.VAE), metadata, None))
    return vae


def _load_image_encoder() -> comfy.clip_vision.ClipVisionModel:
    folder = miniature.IMAGE_ENCODER.parent
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    encoder = comfy.clip_vision.ClipVisionModel(config)
    encoder.load_sd(comfy.utils.load_torch_file(str(miniature.IMAGE_ENCODER)))
    return encoder


class _TextEncoderTarget:
    """What comfy.sd.CLIP builds: WAN's text encoder and tokeniser, with no further arguments."""

    clip = comfy.text_encoders.wan.te()
    tokenizer = comfy.text_encoders.wan.WanT5Tokenizer
    params: dict[str, object] = {}


# The sizes in which the miniature's text encoder differs from WAN's own.
_TEXT_ENCODER_SIZES = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")


def _load_text_encoder(disable_dynamic: bool = False) -> comfy.sd.CLIP:
    config = json.loads(miniature.TEXT_ENCODER_CONFIG.read_text(encoding="utf-8"))
    sizes = {name: config[name] for name in _TEXT_ENCODER_SIZES}
    vocabulary = torch.frombuffer(bytearray(miniature.TOKENIZER.read_bytes()), dtype=torch.uint8)
    clip = comfy.sd.CLIP(
        _TextEncoderTarget,
        tokenizer_data={"spiece_model": vocabulary},
        state_dict=[comfy.utils.load_torch_file(str(miniature.TEXT_ENCODER))],
        model_options={"dtype": _MINIATURE_DTYPE, "umt5xxl_model_config": sizes},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_load_text_encoder_patcher, ())
    return clip


def _load_text_encoder_patcher(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return _load_text_encoder(disable_dynamic).patcher
