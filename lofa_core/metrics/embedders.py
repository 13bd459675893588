"""CLIP and DINO: frames and sentences as vectors. transformers is imported when a folder is opened."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..conditions.image import DEVIATION, MEAN, middle_square
from ..conditions.pretrained import errors_of, open_pretrained

BATCH = 32
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TOKENIZERS = ("tokenizer.json", "vocab.json")


class FrameEmbedder:
    """A network from prepared pictures [B, 3, size, size] to vectors [B, d], in batches.

    `shorter`: what the shorter side is resized to before the middle is cut out (default: `size`).
    """

    def __init__(
        self, network: Any, size: int, statistics: Any, device: torch.device, shorter: int | None = None
    ):
        self._network, self._size, self._shorter, self._device = network, size, shorter, device
        self._mean, self._deviation = (torch.tensor(values).view(3, 1, 1) for values in statistics)

    @torch.no_grad()
    def frames(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> [T, d]."""
        ready = torch.stack([middle_square(frame, self._size, self._shorter) for frame in frames])
        ready = (ready - self._mean) / self._deviation
        parts = [self._network(part.to(self._device)).float().cpu() for part in ready.split(BATCH)]
        return torch.cat(parts).double().numpy()


class CLIP(FrameEmbedder):
    """CLIP's shared space of pictures and sentences (Radford et al. 2021)."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device):
        super().__init__(
            lambda pictures: model.visual_projection(model.vision_model(pixel_values=pictures).pooler_output),
            model.config.vision_config.image_size,
            (MEAN, DEVIATION),
            device,
        )
        self._model, self._tokenizer = model, tokenizer

    @classmethod
    def open(cls, folder: Path, device: torch.device) -> "CLIP":
        """Read a folder as transformers saves CLIPModel and its tokenizer. ValueError where it is none."""
        if not any((folder / name).is_file() for name in _TOKENIZERS):
            raise ValueError(f"{folder}: has no tokenizer ({' or '.join(_TOKENIZERS)}).")
        model = _read("CLIPModel", folder)
        import transformers

        kind: Any = transformers.CLIPTokenizer
        with errors_of(folder, "tokenizer"):
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
        return cls(model.to(device), tokenizer, device)

    @torch.no_grad()
    def sentences(self, sentences: Sequence[str]) -> np.ndarray:
        """[n, d]. A sentence longer than CLIP reads (77 tokens) is cut."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(sentences), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self._device)
        pooled = self._model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return self._model.text_projection(pooled).double().cpu().numpy()


def open_dino(folder: Path, device: torch.device) -> FrameEmbedder:
    """DINO (Caron et al. 2021) as transformers' ViTModel: the class token after the last norm. Pictures as
    DINO's own evaluation prepares them: the shorter side 8/7 of the size (256 for 224), the middle of that.
    """
    model = _read("ViTModel", folder, add_pooling_layer=False).to(device)
    size = model.config.image_size
    return FrameEmbedder(
        lambda pictures: model(pixel_values=pictures).last_hidden_state[:, 0],
        size,
        _IMAGENET,
        device,
        shorter=round(size * 8 / 7),
    )


def _read(kind: str, folder: Path, **options: Any) -> Any:
    """A whole model of transformers from a local folder. ValueError where it is not one."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json here. Name a folder as transformers saves {kind}.")
    return open_pretrained(kind, folder, kind, dtype=torch.float32, **options)
