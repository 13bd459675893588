"""Names of target layers and of whole WAN transformers in every tool's spelling, one visible table each.

The canonical name of a target layer is WAN's original one, `blocks.0.self_attn.q`, and SDXL's diffusers one,
`down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`. The WAN VAE has its own file, key_names_vae.py.
"""

import re
from collections.abc import Iterable

# WAN, inside `blocks.N.`: original name -> diffusers name, in the order of the target layers of a block.
WAN_TARGETS = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",  # image-to-video only
    "cross_attn.v_img": "attn2.add_v_proj",
}
WAN_BLOCK = WAN_TARGETS | {
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # the norm before cross-attention; the other two have no parameters
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
WAN_OUTSIDE_BLOCKS = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",  # first-and-last-frame models
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}

# SDXL: (diffusers place, original place, transformer blocks in it), from the input to the output of the UNet.
SDXL_PLACES = (
    ("down_blocks.1.attentions.0", "input_blocks.4.1", 2),
    ("down_blocks.1.attentions.1", "input_blocks.5.1", 2),
    ("down_blocks.2.attentions.0", "input_blocks.7.1", 10),
    ("down_blocks.2.attentions.1", "input_blocks.8.1", 10),
    ("mid_block.attentions.0", "middle_block.1", 10),
    ("up_blocks.0.attentions.0", "output_blocks.0.1", 10),
    ("up_blocks.0.attentions.1", "output_blocks.1.1", 10),
    ("up_blocks.0.attentions.2", "output_blocks.2.1", 10),
    ("up_blocks.1.attentions.0", "output_blocks.3.1", 2),
    ("up_blocks.1.attentions.1", "output_blocks.4.1", 2),
    ("up_blocks.1.attentions.2", "output_blocks.5.1", 2),
)
SDXL_TARGETS = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
)

# Layout of a LoRA file: (prefix for WAN, prefix for SDXL, names it uses, separator).
LAYOUTS = {
    "comfyui": ("diffusion_model.", "diffusion_model.", "original", "."),
    "original": ("", "", "original", "."),
    "diffusers": ("", "", "diffusers", "."),
    # Kohya writes WAN by its original names and SDXL by its diffusers names.
    "kohya": ("lora_unet_", "lora_unet_", "kohya", "_"),
    "peft": ("transformer.", "unet.", "diffusers", "."),
}
# What may stand before a layer's name in a file or a state dict; the longest that fits is taken off.
PREFIXES = (
    *("model.diffusion_model.", "diffusion_model."),  # checkpoints, ComfyUI
    *("transformer.", "unet.", "base_model.model."),  # diffusers pipelines, raw PEFT
    "lora_unet_",  # Kohya
)

# With every "." written as "_", one pattern for each base reads the names of all layouts. Four digits at
# most: a number in a stranger's name decides how many layers are looked for.
_WAN_KIND = {name.replace(".", "_"): kind for kind, pair in WAN_TARGETS.items() for name in (kind, pair)}
_SDXL_PLACE = {name.replace(".", "_"): place[0] for place in SDXL_PLACES for name in place[:2]}
_SDXL_KIND = {kind.replace(".", "_"): kind for kind in SDXL_TARGETS}
_WAN_FLAT = re.compile(rf"blocks_([0-9]{{1,4}})_({'|'.join(_WAN_KIND)})")
_SDXL_FLAT = re.compile(
    rf"({'|'.join(_SDXL_PLACE)})_transformer_blocks_([0-9]{{1,4}})_({'|'.join(_SDXL_KIND)})"
)
_WAN_NAME = re.compile(rf"blocks\.([0-9]{{1,4}})\.({'|'.join(map(re.escape, WAN_TARGETS))})")
_SDXL_ORIGINAL = {diffusers: original for diffusers, original, _ in SDXL_PLACES}


def canonical_name(module: str) -> str | None:
    """Canonical name of the target layer of this module name (no `.weight`), any layout; None if not one."""
    prefix = max((p for p in PREFIXES if module.startswith(p)), key=len, default="")
    flat = module.removeprefix(prefix).replace(".", "_")
    if match := _WAN_FLAT.fullmatch(flat):
        return f"blocks.{int(match[1])}.{_WAN_KIND[match[2]]}"
    if match := _SDXL_FLAT.fullmatch(flat):
        return f"{_SDXL_PLACE[match[1]]}.transformer_blocks.{int(match[2])}.{_SDXL_KIND[match[3]]}"
    return None


def layout_name(name: str, layout: str) -> str:
    """Module name (no `.lora_A.weight`) that `layout` gives to the target layer of this canonical name.

    Raises ValueError for an unknown layout or a name that is not canonical.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown LoRA layout {layout!r}: choose one of {', '.join(LAYOUTS)}.")
    wan_prefix, sdxl_prefix, names, separator = LAYOUTS[layout]
    if match := _WAN_NAME.fullmatch(name):
        own = f"blocks.{match[1]}.{WAN_TARGETS[match[2]]}" if names == "diffusers" else name
        return wan_prefix + own.replace(".", separator)
    if canonical_name(name) != name:
        raise ValueError(f"{name!r} is not the canonical name of a target layer of WAN2.1 or SDXL.")
    place, rest = name.split(".transformer_blocks.")
    own = f"{_SDXL_ORIGINAL[place]}.transformer_blocks.{rest}" if names == "original" else name
    return sdxl_prefix + own.replace(".", separator)


def default_layout(names: Iterable[str]) -> str:
    """The layout both ComfyUI and diffusers load for the base these canonical names belong to.

    WAN: `comfyui`. SDXL: `kohya` (of PEFT's `unet.` names ComfyUI loads none of the 560, and says nothing).
    """
    return "comfyui" if all(_WAN_NAME.fullmatch(name) for name in names) else "kohya"


def wan_to_diffusers(key: str) -> str:
    """Original key of a WAN transformer -> key in diffusers' WanTransformer3DModel. ValueError if unknown."""
    return _rename(key, WAN_BLOCK, WAN_OUTSIDE_BLOCKS, "an original")


def wan_to_original(key: str) -> str:
    """Key in diffusers' WanTransformer3DModel -> original key of a WAN transformer. ValueError if unknown."""
    return _rename(key, _inverse(WAN_BLOCK), _inverse(WAN_OUTSIDE_BLOCKS), "a diffusers")


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _rename(key: str, in_block: dict[str, str], outside: dict[str, str], whose: str) -> str:
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", key)
    table = in_block if match and match[1] else outside
    if not match or match[2] not in table:
        raise ValueError(f"{key!r} is not {whose} key of a WAN2.1 transformer.")
    return (match[1] or "") + table[match[2]] + (match[3] or "")
