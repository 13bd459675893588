"""Dynamic Degree and Motion Smoothness as VBench defines them (Huang et al., CVPR 2024, arXiv 2311.17982).

Both are pure functions of a flow or an interpolator. VBench's own are RAFT and AMT-S; a second pair uses
OpenCV's DIS flow (Kroeger et al. 2016), which needs no weights: those are ours, their numbers are not
VBench's. Dynamic Degree is a share: the 2.107 and 2.394 of LoFA's Table 2 must be something else, which the
paper does not say.
"""

import contextlib
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .clips import Clip, opencv

# Frames uint8 [H, W, 3] -> pixels moved from the first to the second [H, W, 2], x first.
Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]

_FPS, _SHARE = 8, 0.05


def moves(clip: Clip, flow: Flow) -> float:
    """Dynamic Degree of one video: 1 where it moves, else 0. The share of 1 over all videos is the metric.

    Of its n frames at about 8 a second, a pair of neighbours counts where the longest 5 % of the flow are on
    average more than 6 pixels of a picture whose shorter side is 256; a video moves where n / 4 pairs count.
    VBench's rule, but that one pair at least must count: by its rounding, none need for n of 2. ValueError
    for a video of one frame.
    """
    step = max(1, round(clip.fps / _FPS))
    count = len(range(0, clip.count, step))
    if count < 2:
        raise ValueError(f"{count} frame at {_FPS} a second: nothing can move.")
    wanted = max(1, round(4 * count / 16))
    before: np.ndarray | None = None
    for frame in clip.frames(step):
        if before is not None:
            threshold = 6.0 * min(frame.shape[:2]) / 256.0
            wanted -= largest(flow(before, frame)) > threshold
            if wanted == 0:
                return 1.0
        before = frame
    return 0.0


def largest(flow: np.ndarray) -> float:
    """Mean length of the longest 5 % of the vectors [H, W, 2]."""
    lengths = np.sort(np.linalg.norm(flow, axis=-1), axis=None)
    return float(lengths[-max(1, int(_SHARE * lengths.size)) :].mean())


def smoothness(
    frames: Iterable[np.ndarray], between: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> float:
    """Motion Smoothness by VBench's formula: every second frame is left out and put back by an interpolator
    `between` its neighbours; 1 - the mean absolute difference / 255. ValueError for fewer than three frames.
    """
    waiting: list[np.ndarray] = []
    gaps = []
    for frame in frames:
        waiting.append(frame)
        if len(waiting) == 3:
            first, left_out, last = waiting
            gaps.append(np.abs(between(first, last).astype(np.float32) - left_out).mean())
            waiting = [last]
    if not gaps:
        raise ValueError("fewer than three frames: there is none to leave out.")
    return float(1.0 - np.mean(gaps) / 255.0)


class DISFlow:
    """OpenCV's dense inverse search at its medium preset, on grey frames."""

    def __init__(self) -> None:
        self._opencv = opencv()
        self._dis = self._opencv.DISOpticalFlow_create(self._opencv.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Pixels [H, W, 2], x first. ValueError for frames too small for it."""
        grey = (self._opencv.cvtColor(frame, self._opencv.COLOR_RGB2GRAY) for frame in (first, second))
        try:
            return self._dis.calc(*grey, None)
        except self._opencv.error as error:
            raise ValueError(
                f"DIS flow cannot take {first.shape[1]}x{first.shape[0]} pixels ({error})."
            ) from error

    def between(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The frame in the middle, float32 [H, W, 3]: both frames moved half the way, and their mean."""
        return 0.5 * (self._moved(first, self(first, second)) + self._moved(second, self(second, first)))

    def _moved(self, frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
        rows, columns = np.indices(frame.shape[:2], np.float32)
        return self._opencv.remap(
            frame.astype(np.float32),
            columns - 0.5 * flow[..., 0],
            rows - 0.5 * flow[..., 1],
            self._opencv.INTER_LINEAR,
            borderMode=self._opencv.BORDER_REPLICATE,
        )


class VBenchSmoothness:
    """VBench's own Motion Smoothness, with AMT-S: its package runs it."""

    def __init__(self, model: Any):
        self._model = model

    @classmethod
    def open(cls, path: Path, device: torch.device) -> "VBenchSmoothness":
        """amt-s.pth. ValueError where the package vbench, or one that it needs, is missing."""
        try:
            import vbench
            from vbench.motion_smoothness import MotionSmoothness
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch is the second
            raise ValueError(
                f"the package vbench cannot be imported ({error}). It pins other versions of packages than "
                "LoFA: give it an environment of its own."
            ) from error
        settings = Path(vbench.__file__).with_name("third_party") / "amt" / "cfgs" / "AMT-S.yaml"
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return cls(MotionSmoothness(str(settings), str(path), device.type))
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: not the weights of AMT-S ({error}).") from error

    def __call__(self, clip: Clip) -> float:
        """ValueError for fewer than three frames."""
        if clip.count < 3:
            raise ValueError("fewer than three frames: there is none to leave out.")
        cv2 = opencv()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            for number, frame in enumerate(
                clip.frames()
            ):  # it reads .mp4 or a folder of pictures, nothing else
                cv2.imwrite(f"{folder}/{number:06}.png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            return float(self._model.motion_score(folder))
