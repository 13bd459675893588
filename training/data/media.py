"""Clips and pictures as arrays: video through PyAV, images through Pillow, cut and resized to one size."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from lofa_core.pictures import opened_picture, rgb

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Other formats are lists of further files to open.
_ONLY = {"format_whitelist": "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,gif"}
_MAX_PIXELS = 2**25  # of a frame; 8K has 33 million


def read_clip(path: Path, frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """A video or, by its suffix, an image: uint8 [frames, height, width, 3]; see `read_video`.

    Raises ValueError, also for an image where `frames` is not 1: a still would teach stillness.
    """
    if not is_image(path):
        return read_video(path, frames, height, width, fps)
    if frames != 1:
        raise ValueError(
            f"{path}: an image among clips of {frames} frames. Give a video, or put the images into a "
            "dataset of their own with frames = 1."
        )
    return read_image(path, height, width)


def read_video(path: Path, frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """uint8 [frames, height, width, 3] (RGB), cut to the wanted shape around the centre, then resized.

    `fps` 0: `frames` frames evenly from the first to the last. Else those nearest to 0, 1 / fps, 2 / fps ...
    seconds after the first. Raises ValueError naming the file where it cannot be decoded or is too short.
    """
    picks = _picks(path, frames, fps)
    found = {index: _fitted(frame, height, width) for index, frame in _chosen(path, picks)}
    return np.stack([found[pick] for pick in picks])


def read_whole(path: Path, most: int) -> np.ndarray:
    """A video or an image, not cut: uint8 [T, H, W, 3], of a video `most` frames evenly from the first to the
    last, or all where it has fewer. Raises ValueError naming the file where it cannot be decoded.
    """
    if is_image(path):
        with opened_picture(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(rgb(image))[None]
    count = sum(1 for _ in decoded(path))
    if not count:
        raise ValueError(f"{path}: no frame of this video can be decoded.")
    return np.stack([np.asarray(frame) for _, frame in _chosen(path, _evenly(count, min(most, count)))])


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """uint8 [1, height, width, 3] (RGB), turned as its EXIF says, cut and resized as a video.

    Raises ValueError naming the file where it cannot be decoded.
    """
    with opened_picture(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _fitted(rgb(image), height, width)[None]


def check(path: Path) -> None:
    """Decode an image, or a video's first frame. Raises ValueError naming the file where that fails."""
    if is_image(path):
        with opened_picture(path) as image:
            image.load()
    elif next(decoded(path), None) is None:
        raise ValueError(f"{path}: no frame of this video can be decoded.")


def is_image(path: Path) -> bool:
    """Whether a file is read through Pillow: all others are taken for videos."""
    return path.suffix.lower() in IMAGES


def _picks(path: Path, frames: int, fps: float) -> list[int]:
    """Numbers of the wanted frames, ascending. A first pass over the file: containers' own counts are often
    missing or wrong, and keeping all frames of a long video takes too much memory.
    """
    if not fps:
        count = sum(1 for _ in decoded(path))
        if count < frames:
            raise ValueError(f"{path}: has {count} frames that can be decoded, {frames} are wanted.")
        return _evenly(count, frames)
    wanted = np.arange(frames) / fps
    times = np.array(_times(path, wanted[-1]))
    if not len(times) or times[-1] < wanted[-1] - 0.5 / fps:
        lasts = times[-1] if len(times) else 0.0
        raise ValueError(
            f"{path}: its last frame is at {lasts:.2f} s, {frames} frames at {fps:g} a second need one at "
            f"{wanted[-1]:.2f} s."
        )
    return np.abs(times - wanted[:, None]).argmin(1).tolist()


def _evenly(count: int, frames: int) -> list[int]:
    """Numbers of `frames` of `count` frames, from the first to the last."""
    return np.linspace(0, count - 1, frames).round().astype(int).tolist()


def _chosen(path: Path, picks: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """The frames of these numbers, ascending, as phones show them."""
    for index, frame in enumerate(decoded(path)):
        if index in picks:
            yield index, frame.to_image().rotate(frame.rotation, expand=True)
        if index == picks[-1]:
            return


def _times(path: Path, last: float) -> list[float]:
    """Seconds of each frame after the first, up to the first one at or past `last`."""
    times: list[float] = []
    start = 0.0
    for frame in decoded(path):
        if frame.time is None:
            raise ValueError(f"{path}: its frames have no times. Set fps = 0, or convert it to MP4.")
        if not times:
            start = frame.time
        times.append(frame.time - start)
        if times[-1] >= last:
            break
    return times


def decoded(path: Path) -> Iterator[av.VideoFrame]:
    """The frames of the first video stream, as they are shown."""
    try:
        with av.open(f"file:{path}", metadata_errors="ignore", options=_ONLY) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: has no video stream.")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(f"{path}: nothing here decodes its video. Convert it to MP4 with H.264.")
            if stream.width * stream.height > _MAX_PIXELS:
                raise ValueError(f"{path}: its frames have {stream.width}x{stream.height} pixels, too many.")
            stream.thread_type = "AUTO"
            yield from container.decode(stream)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be decoded as a video ({error.strerror}).") from error


def _fitted(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The largest part around the centre that has the wanted shape, resized: uint8 [height, width, 3]."""
    scale = min(image.width / width, image.height / height)
    across, down = scale * width, scale * height
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, left + across, top + down)
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS, box))
