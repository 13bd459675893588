"""FVD: Frechet Video Distance (Unterthiner et al. 2018, arXiv 1812.01717).

The features come from the package cd-fvd (Ge et al., CVPR 2024): logits of I3D, which the metric was defined
with, or VideoMAE's, which look more at motion. Covariances are over N, as in cd-fvd and StyleGAN-V.
"""

import contextlib
import pickle
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .clips import Clip, opencv
from .distances import frechet_distance

FRAMES, SIDE = 16, 256
_BATCH = 8


class VideoFeatures:
    """I3D or VideoMAE of cd-fvd."""

    def __init__(self, evaluator: Any):
        self._evaluator = evaluator

    @classmethod
    def open(cls, network: str, path: Path, device: torch.device) -> "VideoFeatures":
        """`network`: i3d or videomae. ValueError where the package, or one that it needs, is missing, or the
        file is not that network's."""
        try:
            from cdfvd.fvd import cdfvd
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch is the second
            raise ValueError(f"the package cd-fvd cannot be imported ({error}).") from error
        try:
            with contextlib.redirect_stdout(sys.stderr):
                # It would download what is not there; that the file is there was seen before.
                evaluator = cdfvd(
                    network,
                    ckpt_path=str(path),
                    n_real="full",
                    n_fake="full",
                    compute_feats=True,
                    device=str(device),
                )
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: not the weights of {network} that cd-fvd takes ({error}).") from error
        return cls(evaluator)

    def of(self, clips: Sequence[Clip]) -> np.ndarray:
        """[N, d]. FRAMES frames evenly over each video, the middle square, SIDE pixels a side."""
        self._evaluator.empty_fake_stats()
        self._evaluator.fake_stats.capture_all = True  # emptying forgets it
        for start in range(0, len(clips), _BATCH):
            batch = np.stack([_square(clip.evenly(FRAMES)) for clip in clips[start : start + _BATCH]])
            self._evaluator.add_fake_stats(batch)
        return self._evaluator.fake_stats.get_all()


open_i3d, open_videomae = partial(VideoFeatures.open, "i3d"), partial(VideoFeatures.open, "videomae")


def distance(features: VideoFeatures, generated: Sequence[Clip], real: Sequence[Clip]) -> float:
    """FVD. ValueError for fewer than two videos on a side."""
    return frechet_distance(features.of(generated), features.of(real), ddof=0)


def _square(frames: np.ndarray) -> np.ndarray:
    """The middle square, resized: uint8 [T, SIDE, SIDE, 3]."""
    cv2 = opencv()
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    way = cv2.INTER_AREA if side > SIDE else cv2.INTER_LINEAR
    cut = np.ascontiguousarray(frames[:, top : top + side, left : left + side])
    return np.stack([cv2.resize(frame, (SIDE, SIDE), interpolation=way) for frame in cut])
