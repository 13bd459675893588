"""Relatives of the miniature's base model, for hypernetworks that are to work on more than one.

    python -m training.miniature.relatives --out runs/relatives
        styles_00 ...   fine-tunes: a training look's LoRA merged into the base
        swapped_00 ...  the same function in other coordinates: of some attentions the first half of the heads
                        and the second have changed places, so a LoRA for one is none for another

Each is a base folder that shares all but its diffusion model with the miniature's own.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from lofa_core import miniature
from lofa_core.base_models import BaseWeights
from lofa_core.lora_files import read_safetensors, write_safetensors

from ..lora_dataset import LoRADataset

COUNT = 20
_LORAS = Path(__file__).parent / "loras_training.safetensors"


def swapped(tensors: dict[str, Tensor], attentions: list[str]) -> dict[str, Tensor]:
    """WAN tensors by original name, the two halves of the heads exchanged in the attentions named
    ("blocks.0.self_attn"): rows of q, k and v with their norms, columns of o. The function stays the same.
    """
    found = dict(tensors)
    for attention in attentions:
        for name in ("q", "k", "v"):
            for part in ("weight", "bias"):
                key = f"{attention}.{name}.{part}"
                found[key] = _halves_exchanged(tensors[key], 0)
        for name in ("norm_q", "norm_k"):
            key = f"{attention}.{name}.weight"
            found[key] = _halves_exchanged(tensors[key], 0)
        key = f"{attention}.o.weight"
        found[key] = _halves_exchanged(tensors[key], 1)
    return found


def _halves_exchanged(tensor: Tensor, axis: int) -> Tensor:
    return tensor.roll(tensor.shape[axis] // 2, axis).contiguous()


def merged(tensors: dict[str, Tensor], names: list[str], A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The layers' weights with dW = B A added; A [L, r, in], B [L, out, r]."""
    found = dict(tensors)
    for name, a, b in zip(names, A, B, strict=True):
        found[f"{name}.weight"] = tensors[f"{name}.weight"] + b @ a
    return found


def write(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A base folder with this diffusion model; all else points to the miniature's own."""
    own = miniature.DIFFUSION_MODEL
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "image_encoder"):
        _point(folder / part, miniature.FOLDER / part)
    _point(folder / "transformer" / "config.json", own.with_name("config.json"))
    write_safetensors(tensors, folder / "transformer" / own.name, metadata)


def _point(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def make(out: Path, count: int = COUNT) -> list[Path]:
    """Both families, `count` of each; their folders."""
    tensors, metadata = read_safetensors(miniature.DIFFUSION_MODEL)
    layers = BaseWeights.open(miniature.FOLDER).model.layers
    attentions = list(dict.fromkeys(layer.name.rpartition(".")[0] for layer in layers))
    loras = LoRADataset.load(_LORAS)
    looks = [row for row, task in enumerate(loras.tasks) if task.action is None]
    folders = []
    for number in range(count):
        rng = np.random.default_rng(number)
        chosen = [name for name in attentions if rng.random() < 0.5]
        folders.append(out / f"swapped_{number:02}")
        write(folders[-1], swapped(tensors, chosen), metadata)
        row = looks[number % len(looks)]
        names, own = [layer.name for layer in layers], loras.loras
        folders.append(out / f"styles_{number:02}")
        write(folders[-1], merged(tensors, names, own.A[0][row], own.B[0][row]), metadata)
    return folders


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.miniature.relatives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/relatives"))
    chosen = parser.parse_args()
    with torch.no_grad():
        folders = make(chosen.out)
    Console(highlight=False).print(f"wrote {len(folders)} base folders into {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
