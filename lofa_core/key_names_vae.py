"""Names of the whole WAN VAE: original (which ComfyUI reads) <-> diffusers' AutoencoderKLWan."""

import re

# Modules outside the residual stages, without `.weight`, `.bias` or `.gamma`.
VAE_MODULES = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{side}.{original}": f"{side}.{diffusers}"
        for side in ("encoder", "decoder")
        for original, diffusers in {
            "conv1": "conv_in",
            "middle.1.norm": "mid_block.attentions.0.norm",
            "middle.1.to_qkv": "mid_block.attentions.0.to_qkv",
            "middle.1.proj": "mid_block.attentions.0.proj",
            "head.0": "norm_out",
            "head.2": "conv_out",
        }.items()
    },
}
# Modules inside one stage: a residual block or a resampler.
VAE_STAGE = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
    "resample.1": "resample.1",
    "time_conv": "time_conv",
}
# Stages. The original decoder numbers residual blocks and upsamplers in one row; diffusers makes groups of
# three blocks and an upsampler, the last group without one.
VAE_STAGES = {
    "encoder.middle.0": "encoder.mid_block.resnets.0",
    "encoder.middle.2": "encoder.mid_block.resnets.1",
    "decoder.middle.0": "decoder.mid_block.resnets.0",
    "decoder.middle.2": "decoder.mid_block.resnets.1",
    **{f"encoder.downsamples.{n}": f"encoder.down_blocks.{n}" for n in range(11)},
    **{
        f"decoder.upsamples.{n}": f"decoder.up_blocks.{n // 4}.resnets.{n % 4}"
        for n in range(15)
        if n % 4 < 3
    },
    **{f"decoder.upsamples.{n}": f"decoder.up_blocks.{n // 4}.upsamplers.0" for n in (3, 7, 11)},
}
_TO_DIFFUSERS = VAE_MODULES | {
    f"{stage}.{module}": f"{their_stage}.{their_module}"
    for stage, their_stage in VAE_STAGES.items()
    for module, their_module in VAE_STAGE.items()
}
_TO_ORIGINAL = {theirs: ours for ours, theirs in _TO_DIFFUSERS.items()}


def vae_to_diffusers(key: str) -> str:
    """Original key of the WAN VAE -> its key in diffusers' AutoencoderKLWan. ValueError if unknown."""
    return _rename(key, _TO_DIFFUSERS, "an original")


def vae_to_original(key: str) -> str:
    """Key in diffusers' AutoencoderKLWan -> original key of the WAN VAE. ValueError if unknown."""
    return _rename(key, _TO_ORIGINAL, "a diffusers")


def _rename(key: str, table: dict[str, str], whose: str) -> str:
    module, _, parameter = key.rpartition(".")
    if module not in table or not re.fullmatch("weight|bias|gamma", parameter):
        raise ValueError(f"{key!r} is not {whose} key of a WAN2.1 VAE.")
    return f"{table[module]}.{parameter}"
