"""Style and identity conditions: pictures, as the states of a CLIP image encoder.

The encoder is CLIP-ViT-L (LoFA sections 4.2 and 4.3) or a smaller one of the same architecture. ComfyUI gives
the same states in a CLIP_VISION_OUTPUT. transformers is imported when an encoder is opened.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..documents import read_json
from .pretrained import open_pretrained

# What CLIP was trained with: its pictures' mean and deviation.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPImageEncoder:
    """A CLIP vision tower and how it wants its pictures."""

    def __init__(self, model: Any, size: int, mean: Sequence[float], deviation: Sequence[float]):
        self._model, self._size = model, size
        self._mean, self._deviation = (torch.tensor(x).view(3, 1, 1) for x in (mean, deviation))

    @property
    def width(self) -> int:
        """Numbers per token."""
        return self._model.config.hidden_size

    @classmethod
    def open(cls, folder: Path | str, device: torch.device | str = "cpu") -> "CLIPImageEncoder":
        """Read a folder with config.json and weights (transformers' layout), or a base folder that has it in
        image_encoder/.

        Raises ValueError for a folder without a complete CLIP vision tower, or where transformers is missing.
        """
        folder = Path(folder)
        if (folder / "image_encoder" / "config.json").is_file():
            folder = folder / "image_encoder"
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder}: no config.json of an image encoder here, nor in image_encoder/. Name a folder "
                "with CLIP-ViT-L's vision model as transformers saves it."
            )
        model = open_pretrained("CLIPVisionModel", folder, "CLIP vision tower", dtype=torch.float32)
        processor = folder / "preprocessor_config.json"
        values = read_json(processor) if processor.is_file() else {}
        if not isinstance(values, dict):
            raise ValueError(f"{processor}: holds a {type(values).__name__}; expected an object.")
        mean, deviation = (
            _three(values.get(name, usual), f"{processor}: {name}")
            for name, usual in (("image_mean", MEAN), ("image_std", DEVIATION))
        )
        return cls(model.to(device), model.config.image_size, mean, deviation)

    @torch.no_grad()
    def encode(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pictures uint8 [H, W, 3] of one task, of any size -> tokens [1, n S, d]: the states before the last
        layer, one picture after the other. Raises ValueError for anything else.
        """
        if not len(pictures):
            raise ValueError("no picture was given: name one or more.")
        ready = torch.stack([self._prepared(picture) for picture in pictures]).to(self._model.device)
        states = self._model(pixel_values=ready, output_hidden_states=True).hidden_states[-2]
        return states.flatten(0, 1).unsqueeze(0)

    def _prepared(self, picture: np.ndarray) -> Tensor:
        """The middle square, as large as the encoder wants it, normalised; as ComfyUI prepares it."""
        return (middle_square(picture, self._size) - self._mean) / self._deviation


def _three(values: Any, what: str) -> Sequence[float]:
    given = values if isinstance(values, list | tuple) else ()
    numbers = [value for value in given if type(value) in (int, float) and 0 < value < 100]
    if len(numbers) != 3 or len(given) != 3:
        raise ValueError(f"{what} is {values!r:.60}; expected three numbers above 0.")
    return numbers


def middle_square(picture: np.ndarray, size: int, shorter: int | None = None) -> Tensor:
    """The middle of a picture uint8 [H, W, 3], its shorter side first made `shorter` (default: `size`) pixels
    long, bicubically: [3, size, size] in 0..1, in steps of 1/255. ValueError for anything else.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise ValueError(
            f"a picture is {picture.dtype} {list(picture.shape)}; expected uint8 [height, width, 3]."
        )
    image = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float().unsqueeze(0) / 255.0
    if image.shape[2:] != (size, size) or shorter not in (None, size):
        scale = (shorter or size) / min(image.shape[2:])
        sizes = [round(scale * side) for side in image.shape[2:]]
        image = F.interpolate(image, size=sizes, mode="bicubic", antialias=True)
        top, left = ((side - size) // 2 for side in sizes)
        image = image[:, :, top : top + size, left : left + size]
    return ((255.0 * image).clamp(0, 255).round() / 255.0)[0]
