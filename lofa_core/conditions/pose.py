"""Pose conditions as the pose encoder reads them: float32 [1, 3, T, H, W] in 0..1, skeletons on black.

From keypoints where they are at hand, since lines drawn at the wanted size are clearer than shrunk ones, else
from the frames of a skeleton video.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..steps import UNWATCHED, Watch
from .pose_drawing import check_size, draw_pose, fitted_box
from .pose_keypoints import MAX_FRAMES, parse_pose

_DTYPES = ("uint8", "float16", "bfloat16", "float32", "float64")
_ROUNDING = 1e-3  # how far outside 0..1 a resized picture's values may lie


def pose_from_keypoints(
    document: object, count: int, height: int, width: int, *, watch: Watch = UNWATCHED
) -> Tensor:
    """Draw a POSE_KEYPOINT document's skeletons: float32 [1, 3, count, height, width] in 0..1.

    `count` frames are taken evenly from the first to the last, see `resample_frames`. Raises ValueError for a
    document that `parse_pose` refuses and for a count or size out of range.
    """
    _check_count(count)
    frames = parse_pose(document)
    picked, places = np.unique(_picks(len(frames), count), return_inverse=True)  # each is drawn once
    drawn = draw_pose([frames[pick] for pick in picked], height, width, watch)
    return _as_condition(torch.from_numpy(drawn), places, watch)


def resample_frames(
    frames: Tensor | np.ndarray, count: int, height: int, width: int, *, watch: Watch = UNWATCHED
) -> Tensor:
    """Frames [T, H, W, 3], float in 0..1 or uint8 -> float32 [1, 3, count, height, width] in 0..1.

    In time the frames nearest to `count` even steps from the first to the last; one frame is repeated. In
    space each is fitted whole into the picture, on black; shrinking averages: thin lines fade but stay.
    Raises ValueError for other shapes and dtypes, a count or size out of range, and values that are not
    finite or not in 0..1 in a frame that is used.
    """
    _check_count(count)
    check_size(height, width)
    if str(frames.dtype).removeprefix("torch.") not in _DTYPES:
        raise ValueError(f"The pose clip is {frames.dtype}; expected uint8, or floats in 0..1.")
    clip = torch.from_numpy(np.ascontiguousarray(frames)) if isinstance(frames, np.ndarray) else frames
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.numel() == 0:
        raise ValueError(
            f"The pose clip has shape {tuple(clip.shape)}; expected [T, H, W, 3]: frames of red, green, blue."
        )
    picked, places = np.unique(_picks(len(clip), count), return_inverse=True)
    top, left, rows, columns = fitted_box(clip.shape[1], clip.shape[2], height, width)
    fitted = torch.zeros(len(picked), height, width, 3, device=clip.device)
    for picture, pick in zip(fitted, watch.each(picked.tolist(), len(picked)), strict=True):
        frame = _values(clip[pick], pick).permute(2, 0, 1)[None]
        frame = interpolate(frame, (rows, columns), mode="bilinear", antialias=True)
        picture[top : top + rows, left : left + columns] = frame[0].permute(1, 2, 0)
    return _as_condition(fitted, places, watch)


def _picks(frames: int, count: int) -> np.ndarray:
    """Numbers of the `count` frames that are nearest to even steps from the first to the last."""
    return np.linspace(0, frames - 1, count).round().astype(np.int64)


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_FRAMES:
        raise ValueError(f"A pose of {count} frames is asked for; expected 1 to {MAX_FRAMES}.")


def _values(frame: Tensor, number: int) -> Tensor:
    """A frame as float32 in 0..1."""
    if frame.dtype == torch.uint8:
        return frame.float() / 255.0
    frame = frame.float()
    low, high = frame.min().item(), frame.max().item()  # not a number where any value is not
    if not (low >= -_ROUNDING and high <= 1.0 + _ROUNDING):
        raise ValueError(
            f"Frame {number} of the pose clip has values from {low:g} to {high:g}; expected 0 to 1. "
            "Divide values up to 255 by 255."
        )
    return frame.clamp(0.0, 1.0)


def _as_condition(pictures: Tensor, places: np.ndarray, watch: Watch) -> Tensor:
    """The pictures at these places, of [N, H, W, 3] in uint8 or as floats in 0..1 -> [1, 3, T, H, W]."""
    condition = pictures.new_empty(1, 3, len(places), *pictures.shape[1:3], dtype=torch.float32)
    for frame, place in enumerate(watch.each(places.tolist(), len(places))):
        condition[0, :, frame] = _values(pictures[place], place).permute(2, 0, 1)
    return condition
