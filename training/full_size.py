"""Stand-ins of real size: WAN2.1-T2V-1.3B and LoFA_v0 with random weights under their real names and shapes.

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
    condition_width=4096,
    out_features=1536,
    in_features=1536,
    rank=32,
    patch=96,
    width=768,
    heads=12,
    blocks=8,
    feature_blocks=(3, 7),
    **RELEASED_DESIGN,
)
LAYERS = 8 * WAN_1_3B["num_layers"]
WORDS = 48  # tokens of a prompt; 464 rows of padding follow


def released_hypernetwork(
    seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", layers: int = LAYERS
) -> Hypernetwork:
    """LoFA_v0's architecture at the published size, random, for the first `layers` target layers."""
    shape = (RELEASED.out_features, RELEASED.in_features)
    described = tuple(
        LayerDescription(
            f"blocks.{number // 8}.{WAN_KINDS[number % 8]}", number // 8, WAN_KINDS[number % 8], shape
        )
        for number in range(layers)
    )
    network = Hypernetwork.unfilled(
        RELEASED,
        BaseDescription("WAN2.1-T2V-1.3B", described),
        ConditionDescription("text", RELEASED.condition_width, padded_to=PROMPT_TOKENS),
    )
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
    width = RELEASED.condition_width
    states = torch.zeros(1, PROMPT_TOKENS, width, device=draw.device)
    states[:, :words] = torch.randn(1, words, width, generator=draw, device=draw.device)
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
