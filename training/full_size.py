"""Stand-ins of real size: WAN2.1-T2V-1.3B, SDXL and LoFA_v0, random under their real names and shapes.

`python -m training.full_size --out FOLDER` writes a base file of 1.4 billion bfloat16 parameters, the two
published stages in float32 and a text condition. Loading, memory and speed are those of the real files; what
comes out of them is noise.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from torch import Tensor

from lofa_core.base_models import WAN_KINDS
from lofa_core.descriptions import BaseDescription, ConditionDescription, HypernetworkConfig, LayerDescription
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.inspection import CONDITION_KEY
from lofa_core.key_names import wan_to_original
from lofa_core.lora_files import write_safetensors
from lofa_core.released import PROMPT_TOKENS, RELEASED_DESIGN, published_state

BASE, STAGE1, STAGE2, CONDITION = (
    "wan2.1_t2v_1.3B_random.safetensors",
    "stage1_preview.pth",
    "stage2_preview.pth",
    "condition.safetensors",
)
# The sizes that WanTransformer3DModel's own defaults (those of the 14B) lack.
WAN_1_3B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
RELEASED = HypernetworkConfig(
    rank=32,
    width=768,
    heads=12,
    blocks=8,
    feature_blocks=(3, 7),
    **RELEASED_DESIGN,
)
# What UNet2DConditionModel's own defaults (those of Stable Diffusion 1) have otherwise.
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SIDE, TEXT_WIDTH = 1536, 4096
LAYERS = 8 * WAN_1_3B["num_layers"]
WORDS = 48  # tokens of a prompt; 464 rows of padding follow


def released_hypernetwork(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", layers: int = LAYERS
) -> Hypernetwork:
    """LoFA_v0's architecture at the published size, random, for the first `layers` target layers."""
    shape = (SIDE, SIDE)
    described = tuple(
        LayerDescription(
            f"blocks.{number // 8}.{WAN_KINDS[number % 8]}", number // 8, WAN_KINDS[number % 8], shape
        )
        for number in range(layers)
    )
    base = BaseDescription("WAN2.1-T2V-1.3B", described)
    condition = ConditionDescription("text", TEXT_WIDTH, padded_to=PROMPT_TOKENS)
    return random_hypernetwork(RELEASED, base, condition, seed, dtype, device)


def random_hypernetwork(
    config: HypernetworkConfig,
    base: BaseDescription,
    condition: ConditionDescription,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Hypernetwork:
    """One of random weights, in inference mode."""
    network = Hypernetwork.unfilled(config, base, (condition,))
    draw = torch.Generator(device).manual_seed(seed)
    return network.filled(
        {key: _random(key, tuple(value.shape), draw, dtype) for key, value in network.own_state().items()}
    ).to(device)


def base_shapes() -> dict[str, tuple[int, ...]]:
    """Original key -> shape of every tensor of WAN2.1-T2V-1.3B."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**WAN_1_3B)
    return {wan_to_original(key): tuple(value.shape) for key, value in model.state_dict().items()}


def random_parameters(model: torch.nn.Module, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """A state dict for a model that was built on the meta device."""
    draw = torch.Generator().manual_seed(seed)
    return {key: _random(key, tuple(value.shape), draw, dtype) for key, value in model.state_dict().items()}


def random_condition(words: int, draw: torch.Generator) -> Tensor:
    """Text states [1, 512, 4096] of a prompt of so many tokens, zero after its end."""
    states = torch.zeros(1, PROMPT_TOKENS, TEXT_WIDTH, device=draw.device)
    states[:, :words] = torch.randn(1, words, TEXT_WIDTH, generator=draw, device=draw.device)
    return states


def _random(key: str, shape: tuple[int, ...], draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A parameter that keeps activations of order one, and the LoRA a small fraction of the base weights."""
    deviation = max(1, torch.Size(shape[1:]).numel()) ** -0.5 if len(shape) > 1 else 0.02
    if ".heads." in key:
        deviation *= 0.02
    mean = 1.0 if "norm" in key and key.endswith("weight") else 0.1 if ".scales." in key else 0.0
    return torch.empty(shape, dtype=dtype, device=draw.device).normal_(mean, deviation, generator=draw)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.full_size",
        description="Write WAN2.1-T2V-1.3B and LoFA_v0 of real size with random weights (4.5 GB).",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    console, draw = Console(highlight=False), torch.Generator().manual_seed(chosen.seed)

    def say(name: str) -> None:
        console.print(f"wrote {chosen.out / name} ({(chosen.out / name).stat().st_size / 1e9:.2f} GB)")

    base = {key: _random(key, shape, draw, torch.bfloat16) for key, shape in base_shapes().items()}
    write_safetensors(base, chosen.out / BASE, {"note": "random weights, made for measurements"})
    say(BASE)
    del base
    for name, state in zip(
        (STAGE1, STAGE2), published_state(released_hypernetwork(chosen.seed)), strict=True
    ):
        torch.save(state, chosen.out / name)
        say(name)
    write_safetensors({CONDITION_KEY: random_condition(WORDS, draw)}, chosen.out / CONDITION, {})
    say(CONDITION)
    return 0


if __name__ == "__main__":
    sys.exit(main())
