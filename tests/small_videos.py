"""Videos of a few small frames, made for the tests of the metrics."""

from pathlib import Path

import cv2
import numpy as np


def square(frames: int = 9, side: int = 96, step: int = 6, size: int = 40, seed: int = 0) -> np.ndarray:
    """A textured square on a textured ground that goes `step` pixels to the right each frame: uint8
    [frames, side, side, 3]."""
    rng = np.random.default_rng(seed)
    ground, thing = (
        cv2.GaussianBlur(rng.integers(0, 256, (n, n, 3), np.uint8), (0, 0), 2) for n in (side, size)
    )
    shown = np.repeat(ground[None] // 2, frames, 0)
    top = (side - size) // 2
    for number, frame in enumerate(shown):
        left = 2 + number * step
        frame[top : top + size, left : left + size] = (128 + thing // 2)[:, : max(0, side - left)]
    return shown


def write_video(path: Path, frames: np.ndarray, fps: float = 8.0) -> Path:
    """Lossless: what is read is what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), fps, frames.shape[2:0:-1])
    assert writer.isOpened()
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def write_picture(path: Path, picture: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return path
