"""Small files of every kind that LoFA reads, and what may come of reading one."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from injuries import RAN
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_media import numbered, write_video
from test_released import SMALL, released
from tiny import CONFIG, POSE, TEXT, base_tensors, describe, network

from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import load_generator, save_hypernetwork, save_lora_diffusion
from lofa_core.command_conditions import read_conditions
from lofa_core.descriptions import BaseDescription, ConditionDescription
from lofa_core.inspection import inspect
from lofa_core.key_names import LAYOUTS, SDXL_PLACES, SDXL_TARGETS
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_diffusion import LoRADiffusion, LoRADiffusionConfig
from lofa_core.lora_files import load_lora, load_target_layers, save_lora
from lofa_core.pictures import read_picture
from lofa_core.released import load_released, published_state
from lofa_core.safetensors_file import open_safetensors
from training.config import DataConfig, load_config
from training.data import media
from training.data.cache import read_cached
from training.data.published import read_lora, read_published, read_tensors
from training.data.task_folder import read_task_folder
from training.experiments import Plan
from training.lora_dataset import LoRAFolder

CONFIGS = Path(__file__).resolve().parents[1] / "training/configs"
_NOTHING = dict.fromkeys(("condition", "pose", "style", "identity", "prompt", "image_encoder"))
_LORA = {f"blocks.0.self_attn.{part}": (4, 4) for part in "qkvo"}
_SDXL_LORA = {f"{SDXL_PLACES[0][0]}.transformer_blocks.0.{kind}": (4, 4) for kind in SDXL_TARGETS}


@dataclass(frozen=True)
class Kind:
    """One kind of file: a sound one, under its name, and all that reads it."""

    name: str
    sound: bytes
    read: Callable[[Path], object]


def kinds(folder: Path) -> dict[str, Kind]:
    """Every kind of file by its name, written into `folder` too, for some are read beside others."""
    readers: dict[str, Callable[[Path], object]] = {}
    for write in (_hypernetworks, _bases, _loras, _conditions, _media, _datasets, _configurations):
        readers |= write(folder)
    return {name: Kind(name, (folder / name).read_bytes(), read) for name, read in readers.items()}


def _hypernetworks(folder: Path) -> dict[str, Callable[[Path], object]]:
    torch.manual_seed(0)
    small = replace(CONFIG, width=8, blocks=1, feature_blocks=(0,), rank=1, pooling_queries=1)
    tiny = describe(1, (4, 4))
    save_hypernetwork(network(0, small, tiny), folder / "h.safetensors")
    save_hypernetwork(network(0, small, tiny), folder / "h8.safetensors", dtype=torch.int8)
    save_lora_diffusion(_lora_diffusion(tiny), folder / "d.safetensors")
    published = replace(SMALL, width=6, blocks=1, feature_blocks=(0,), rank=1)
    stages = published_state(released(published, depths=1, shape=(8, 8), words=4))
    for stage, state in zip(("stage1", "stage2"), stages, strict=True):
        torch.save(state, folder / f"{stage}.pth")
    return {
        **dict.fromkeys(("h.safetensors", "h8.safetensors", "d.safetensors"), _all(load_generator, inspect)),
        "stage1.pth": _all(lambda path: load_released(path, folder / "stage2.pth"), inspect),
        "stage2.pth": _all(lambda path: load_released(folder / "stage1.pth", path), inspect),
    }


def _lora_diffusion(base: BaseDescription) -> LoRADiffusion:
    config = LoRADiffusionConfig(
        rank=1, latent=4, layer_width=2, vae_width=4, width=8, blocks=1, pooling_queries=1, steps=2
    )
    return LoRADiffusion(config, base, (ConditionDescription("text", 6),))


def _bases(folder: Path) -> dict[str, Callable[[Path], object]]:
    tensors = base_tensors(1, 4)
    save_file(tensors, folder / "base.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "base.safetensors")}
    (folder / "base.safetensors.index.json").write_text(json.dumps(index))
    read = _all(_read_base, inspect)
    return {"base.safetensors": read, "base.safetensors.index.json": read}


def _read_base(path: Path) -> None:
    base = BaseWeights.open(path)
    base.fingerprint()
    for layer in base.model.layers:
        base.read(layer)


def _loras(folder: Path) -> dict[str, Callable[[Path], object]]:
    readers = {}
    for layout in (*LAYOUTS, "sdxl"):
        name = f"lora_{layout}.safetensors"
        lora = random_lora(_SDXL_LORA if layout == "sdxl" else _LORA, {"lofa_prompt": "a person"})
        save_lora(lora, folder / name, "kohya" if layout == "sdxl" else layout)
        readers[name] = _all(load_lora, load_target_layers, inspect)
    return readers


def random_lora(shapes: dict[str, tuple[int, int]], metadata: dict[str, str] | None = None) -> LoRA:
    layers = {
        name: LoRALayer(torch.randn(2, into), torch.randn(out, 2), 2.0)
        for name, (out, into) in shapes.items()
    }
    return LoRA(layers, metadata or {})


def _conditions(folder: Path) -> dict[str, Callable[[Path], object]]:
    save_file({"text_emb": torch.randn(1, 3, TEXT.width)}, folder / "c.safetensors")
    person = {"pose_keypoints_2d": [1.0, 2.0, 0.5] * 18}
    pose = [{"people": [person], "canvas_width": 64, "canvas_height": 64}] * 2
    (folder / "pose.json").write_text(json.dumps(pose))
    return {
        "c.safetensors": _all(lambda path: _read_condition("condition", path), inspect),
        "pose.json": lambda path: _read_condition("pose", path),
    }


def _read_condition(option: str, path: Path) -> object:
    options = argparse.Namespace(**(_NOTHING | {option: path, "weight": ()}))
    return read_conditions(options, {"text": TEXT, "pose": POSE}, path)


def _datasets(folder: Path) -> dict[str, Callable[[Path], object]]:
    record = {"task": "a", "status": "done", "file": "a.safetensors", "sha256": "0", "loss": 0.1}
    (folder / "manifest.jsonl").write_text(json.dumps(record | {"reason": None}) + "\n")
    tasks = '{"id": "wave", "prompt": "waves", "clips": [{"file": "picture.png"}]}\n'
    (folder / "tasks.jsonl").write_text(tasks)
    state = {f"{name}.lora_{part}.weight": torch.randn(2, 2) for name in _LORA for part in "AB"}
    torch.save(state, folder / "lora.pth")
    torch.save({"prompt_emb": torch.randn(3, 4), "latents": torch.randn(2, 1, 2, 2)}, folder / "tensors.pth")
    entry = {"id": "wave", "prompt": "waves", "lora_path": "lora.pth", "path": "tensors.pth"}
    (folder / "metadata.json").write_text(json.dumps([entry]))
    task = {"id": "wave", "prompt": "", "coarse_prompt": "", "split": "training", "clips": [{"file": "a"}]}
    metadata = {"key": "0", "task": json.dumps(task | {"pose": []}), "problems": "[]"}
    save_file({"latents": torch.randn(1, 2, 2)}, folder / "cached.safetensors", metadata)
    return {
        "manifest.jsonl": lambda path: LoRAFolder(path.parent).records(),
        "tasks.jsonl": lambda path: read_task_folder(path.parent, DataConfig()),
        "metadata.json": lambda path: read_published(path.parent),
        "lora.pth": read_lora,
        "tensors.pth": read_tensors,
        "cached.safetensors": read_cached,
    }


def _media(folder: Path) -> dict[str, Callable[[Path], object]]:
    colours = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    readers: dict[str, Callable[[Path], object]] = {}
    for suffix in media.IMAGES:
        colours.save(folder / f"picture{suffix}")
        readers[f"picture{suffix}"] = _all(read_picture, lambda path: media.read_image(path, 8, 8))
    write_video(folder / "clip.mp4", numbered(4), codec="mpeg4")
    readers["clip.mp4"] = _all(media.check, lambda path: media.read_video(path, 2, 8, 8, 0))
    return readers


def _configurations(folder: Path) -> dict[str, Callable[[Path], object]]:
    for name, source in (("run.toml", "miniature.toml"), ("plan.toml", "experiments.toml")):
        (folder / name).write_bytes((CONFIGS / source).read_bytes())
    return {"run.toml": load_config, "plan.toml": Plan.load}


def _all(*readers: Callable[[Path], object]) -> Callable[[Path], None]:
    """Every reader has its turn; the first one's error counts."""

    def read(path: Path) -> None:
        errors = []
        for reader in readers:
            try:
                reader(path)
            except (ValueError, OSError) as error:
                errors.append(error)
                check_error(error, path)
        if errors:
            raise errors[0]

    return read


def outcome(kind: Kind, path: Path) -> str:
    """ "read" or "refused". Fails where anything else comes of reading the file."""
    try:
        kind.read(path)
    except (ValueError, OSError) as error:
        check_error(error, path)
        return "refused"
    finally:
        assert RAN not in os.environ, "code in the file was run"
    return "read"


def check_error(error: Exception, path: Path) -> None:
    """An error names the file, or the other one of two that belong together, and is short."""
    said = str(error)
    named = ("stage1.pth", "stage2.pth") if "stage" in path.name else (path.name, str(path.parent))
    assert isinstance(error, ValueError | FileNotFoundError), repr(error)[:300]
    assert any(name in said for name in named), said[:300]
    assert len(said) < 2500 and said.isprintable(), said[:300]


def agrees_with_the_library(path: Path) -> None:
    """What we read of a safetensors file, the safetensors library reads too, and the same."""
    try:
        own = open_safetensors(path)
    except (ValueError, OSError):
        return
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(own) and (theirs.metadata() or {}) == own.metadata
        for key in own:
            try:
                value = own.tensor(key)
            except ValueError as error:
                assert "which is not read" in str(error)
                continue
            other = theirs.get_tensor(key)
            assert value.dtype == other.dtype and value.shape == other.shape
            if value.numel() and value.dtype != torch.bool:
                assert torch.equal(value.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
