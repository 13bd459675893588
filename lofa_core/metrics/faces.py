"""Faces: found by YuNet, compared by SFace, told apart by LPIPS.

LoFA's Table 3 follows PhotoMaker (Li et al., CVPR 2024): faces found by RetinaFace and compared by FaceNet;
diversity is the mean LPIPS between the generated faces of a person (in the table, a hundred times that).
OpenCV's two networks (Wu et al. 2023, Zhong et al. 2021) are well kept and need no package of their own; with
them, face similarity is not on the scale of that table.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .clips import opencv
from .weights import fill, read_state

_CROP = 256


class FaceFinder:
    """YuNet, an ONNX file, through OpenCV."""

    def __init__(self, path: Path):
        self._opencv = opencv()
        try:
            self._detector = self._opencv.FaceDetectorYN.create(str(path), "", (320, 320))
        except self._opencv.error as error:
            raise ValueError(f"{path}: OpenCV cannot read it as a face detector ({error}).") from error

    @classmethod
    def open(cls, path: Path, device: torch.device) -> "FaceFinder":
        """On the CPU, whatever the device: the headless OpenCV knows no other."""
        return cls(path)

    def largest(self, frame: np.ndarray) -> np.ndarray | None:
        """The largest face of a frame uint8 [H, W, 3]: [15], x, y, width, height, five landmarks' x
        and y, score; None where there is none."""
        self._detector.setInputSize((frame.shape[1], frame.shape[0]))
        faces = self._detector.detect(self._opencv.cvtColor(frame, self._opencv.COLOR_RGB2BGR))[1]
        if faces is None:
            return None
        return max(faces, key=lambda face: face[2] * face[3])

    def crop(self, frame: np.ndarray) -> np.ndarray | None:
        """The square around the largest face, uint8 [256, 256, 3], the frame's edge repeated beyond it."""
        face = self.largest(frame)
        if face is None:
            return None
        side = max(1, round(float(max(face[2:4]))))
        left, top = (
            round(float(start + (length - side) / 2))
            for start, length in zip(face[:2], face[2:4], strict=True)
        )
        rows = np.clip(np.arange(top, top + side), 0, frame.shape[0] - 1)
        columns = np.clip(np.arange(left, left + side), 0, frame.shape[1] - 1)
        way = self._opencv.INTER_AREA if side > _CROP else self._opencv.INTER_LINEAR
        return self._opencv.resize(frame[rows[:, None], columns], (_CROP, _CROP), interpolation=way)


class FaceEmbedder:
    """Frames as vectors of their largest face: found by YuNet, turned upright and embedded by SFace."""

    def __init__(self, finder: FaceFinder, path: Path):
        self._opencv, self._finder = opencv(), finder
        try:
            self._recogniser = self._opencv.FaceRecognizerSF.create(str(path), "")
        except self._opencv.error as error:
            raise ValueError(f"{path}: OpenCV cannot read it as a face recogniser ({error}).") from error

    @classmethod
    def open(cls, yunet: Path, sface: Path, device: torch.device) -> "FaceEmbedder":
        return cls(FaceFinder(yunet), sface)

    def frames(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> [T, 128], nan in the rows of frames without a face. ValueError where no frame
        has one."""
        found = [self._embedded(frame) for frame in frames]
        seen = [features for features in found if features is not None]
        if not seen:
            raise ValueError(f"no face in {len(frames)} frames.")
        return np.stack(
            [np.full_like(seen[0], np.nan) if features is None else features for features in found]
        )

    def _embedded(self, frame: np.ndarray) -> np.ndarray | None:
        face = self._finder.largest(frame)
        if face is None:
            return None
        upright = self._recogniser.alignCrop(self._opencv.cvtColor(frame, self._opencv.COLOR_RGB2BGR), face)
        return self._recogniser.feature(upright).ravel().astype(np.float64)


class LPIPS(nn.Module):
    """The learned perceptual distance of Zhang et al. 2018 (arXiv 1801.03924), version 0.1 on AlexNet."""

    _LAYERS = (
        (3, 64, 11, 4, 2),
        (64, 192, 5, 1, 2),
        (192, 384, 3, 1, 1),
        (384, 256, 3, 1, 1),
        (256, 256, 3, 1, 1),
    )
    _PLACES = (
        0,
        3,
        6,
        8,
        10,
    )  # of the convolutions in torchvision's AlexNet; pooling before the second and third
    _SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self) -> None:
        super().__init__()
        convolutions = (
            nn.Conv2d(a, b, kernel, stride, padding) for a, b, kernel, stride, padding in self._LAYERS
        )
        self.features = nn.ModuleDict(
            {str(place): layer for place, layer in zip(self._PLACES, convolutions, strict=True)}
        )
        for number, layer in enumerate(self._LAYERS):
            self.add_module(
                f"lin{number}",
                nn.ModuleDict({"model": nn.ModuleDict({"1": nn.Conv2d(layer[1], 1, 1, bias=False)})}),
            )
        self._pool = nn.MaxPool2d(3, 2)

    @classmethod
    def open(cls, alexnet: Path, lpips: Path, device: torch.device) -> "LPIPS":
        """torchvision's AlexNet and LPIPS's linear weights. ValueError where they are something else."""
        model = cls()
        state = read_state(alexnet) | read_state(lpips)
        fill(model, state, lpips, f"LPIPS's linear weights, or {alexnet} is not torchvision's AlexNet")
        return model.to(device)

    @torch.no_grad()
    def between(self, first: np.ndarray, second: np.ndarray) -> float:
        """Distance of two pictures uint8 [H, W, 3] of one size."""
        total = 0.0
        for number, (a, b) in enumerate(zip(self._seen(first), self._seen(second), strict=True)):
            weights = self.get_submodule(f"lin{number}.model.1")
            total += float(weights((a - b) ** 2).mean())
        return total

    def _seen(self, picture: np.ndarray) -> list[Tensor]:
        """Each layer's features, of length 1 at each place."""
        device = next(self.parameters()).device
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1.0
        x = (x - x.new_tensor(self._SHIFT).view(3, 1, 1)) / x.new_tensor(self._SCALE).view(3, 1, 1)
        found = []
        for number, place in enumerate(self._PLACES):
            x = self.features[str(place)](self._pool(x) if number in (1, 2) else x).relu()
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found
