"""Models so large that what the nodes do with them takes seconds: layers of WAN2.1-1.3B's and LoFA_v0's own
sizes, fewer of them, weights random.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from tiny import CONFIG
from tiny import network as smaller_network
from transformers import UMT5Config, UMT5EncoderModel

from lofa_core import miniature
from lofa_core.base_models import WAN_KINDS
from lofa_core.checkpoint import save_hypernetwork
from lofa_core.descriptions import BaseDescription, ConditionDescription, LayerDescription
from lofa_core.key_names import wan_to_original
from lofa_core.lora_files import write_safetensors
from lofa_core.released import published_state
from training.full_size import RELEASED, SIDE, random_hypernetwork, random_parameters

BLOCKS = 2  # of 30
WIDTH = 768  # of a token of the text
POSE = (81, 480, 832)  # a WAN clip's frames and size
TEXT_ENCODER = {"d_model": WIDTH, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 24}


def write(models: Path) -> list[Path]:
    """The files, written below ComfyUI's models folder."""
    made = {
        "diffusion_models/large.safetensors": base(),
        "text_encoders/large.safetensors": text_encoder(),
        "loras/large.safetensors": lora(layers=240, rank=128),
        "loras/fits.safetensors": lora(layers=8 * BLOCKS, rank=16),
    }
    for name, (tensors, metadata) in made.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(tensors, models / name, metadata)
    layers = tuple(
        LayerDescription(f"blocks.{depth}.{kind}", depth, kind, (SIDE, SIDE))
        for depth in range(BLOCKS)
        for kind in WAN_KINDS
    )
    known = BaseDescription("WAN2.1", layers)
    text = ConditionDescription("text", WIDTH, padded_to=512)
    network = random_hypernetwork(replace(RELEASED, blocks=2, feature_blocks=(1,)), known, text)
    files = [models / name for name in made]
    files.append(models / "lofa/large.safetensors")
    save_hypernetwork(network, files[-1], dtype=torch.bfloat16)
    for place, stage in enumerate(published_state(network), 1):
        files.append(models / f"lofa/large_stage{place}.pth")
        torch.save(stage, files[-1])
    pose = ConditionDescription("pose", 3, size=POSE)
    files.append(models / "lofa/large_pose.safetensors")
    save_hypernetwork(smaller_network(1, replace(CONFIG, grid=(4, 4)), known, conditions=(pose,)), files[-1])
    return files


def base() -> tuple[dict, dict]:
    sizes = {"num_attention_heads": 12, "num_layers": BLOCKS, "ffn_dim": 8960, "text_dim": WIDTH}
    with torch.device("meta"):
        model = WanTransformer3DModel(**sizes)
    tensors = random_parameters(model, torch.bfloat16)
    found = {"transformer": {"num_heads": 12, "text_dim": WIDTH}}
    return {wan_to_original(key): value for key, value in tensors.items()}, {"config": json.dumps(found)}


def text_encoder() -> tuple[dict, dict]:
    """UMT5 of a base-sized width with the miniature's words."""
    config = json.loads(miniature.TEXT_ENCODER_CONFIG.read_text(encoding="utf-8")) | TEXT_ENCODER
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**config))
    tensors = random_parameters(model, torch.float16)
    vocabulary = torch.frombuffer(bytearray(miniature.TOKENIZER.read_bytes()), dtype=torch.uint8)
    sizes = TEXT_ENCODER | {"vocab_size": config["vocab_size"]}
    return tensors | {"spiece_model": vocabulary}, {
        "umt5xxl_model_config": json.dumps(sizes)
    }  # as small_sizes.py reads it


def lora(layers: int, rank: int) -> tuple[dict, dict]:
    """Of the first layers of the 1.3B."""
    tensors = {}
    for number in range(layers):
        name = f"diffusion_model.blocks.{number // 8}.{WAN_KINDS[number % 8]}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, SIDE) / SIDE**0.5
        tensors[f"{name}.lora_B.weight"] = 0.01 * torch.randn(SIDE, rank)
    return tensors, {}
