"""The files of weights that the user names, and reading them."""

import argparse
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# Name in --weights -> what it is.
WEIGHTS = {
    "i3d": "i3d_pretrained_400.pt, as cd-fvd takes it",
    "videomae": "vit_g_hybrid_pt_1200e_ssv2_ft.pth, as cd-fvd takes it",
    "clip": "a folder of transformers' CLIPModel with its tokenizer, such as clip-vit-large-patch14",
    "dino": "a folder of transformers' ViTModel, DINO's ViT-S/16: dino-vits16",
    "csd": "CSD's checkpoint.pth, or the same tensors as .safetensors",
    "raft": "raft-things.pth",
    "amt": "amt-s.pth",
    "yunet": "OpenCV's face detector, face_detection_yunet_2023mar.onnx",
    "sface": "OpenCV's face recogniser, face_recognition_sface_2021dec.onnx",
    "alexnet": "torchvision's alexnet-owt-7be5be79.pth",
    "lpips": "LPIPS's linear weights, v0.1/alex.pth",
}

T = TypeVar("T")


class Weights:
    """Named paths and the models opened from them, each once."""

    def __init__(self, paths: Mapping[str, Path], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._paths = dict(paths)
        self._opened: dict[tuple[str, ...], Any] = {}

    def missing(self, names: tuple[str, ...]) -> str | None:
        """Why a metric that needs these weights cannot run; None where they are all there."""
        for name in names:
            if name not in self._paths:
                return f"no weights: --weights {name}=PATH, {WEIGHTS[name]}"
            if not self._paths[name].exists():
                return f"--weights {name}={self._paths[name]}: no such file or folder"
        return None

    def opened(self, names: tuple[str, ...], open_: Callable[..., T]) -> T:
        """`open_` of the paths of these names and the device; the second time, what it gave before."""
        if names not in self._opened:
            self._opened[names] = open_(*(self._paths[name] for name in names), self.device)
        return self._opened[names]


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a checkpoint of torch.save, which may hold them under
    "state_dict", "model_state_dict" or "model", perhaps with "module." before each name. Nothing is run.

    ValueError where the file holds something else or is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            # CSD's checkpoint holds the options of its training, too: names and plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors; it was not run. Save its tensors as .safetensors."
        ) from error
    except (RuntimeError, EOFError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: is damaged, or no file of weights ({error}).") from error
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    tensors = state if isinstance(state, Mapping) else {}
    found = {
        str(name).removeprefix("module."): value
        for name, value in tensors.items()
        if isinstance(value, Tensor)
    }
    if not found:
        raise ValueError(f"{path}: holds no tensors by name.")
    return found


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load all of a model's tensors; others in `state` are left. ValueError naming what does not fit."""
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in state:
            raise ValueError(f"{path}: is not {what}: it has no {name}.")
        if state[name].shape != value.shape:
            raise ValueError(
                f"{path}: is not {what}: {name} is {list(state[name].shape)}, expected {list(value.shape)}."
            )
    model.load_state_dict({name: state[name].to(value.dtype) for name, value in wanted.items()})
    model.eval()
