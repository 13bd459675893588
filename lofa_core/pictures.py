"""Opening pictures that come from strangers."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

# Pillow reads some forty more, among them EPS, for which it would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 45_000_000  # of a camera with 8192 x 5464; a decoded one takes 0.5 GB at most
# What Pillow raises for damaged files.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, OverflowError, LookupError, TypeError, AttributeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """A picture, of which nothing but the header is read yet. ValueError naming the file where it is none,
    also for what turns out while it is read in the context.
    """
    if not path.is_file():  # a pipe or a device could let us wait for ever
        raise ValueError(f"{path}: no such file.")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(
                    f"it has {width}x{height} pixels, {MAX_PIXELS // 10**6} million are read at most"
                )
            yield picture
    except _DAMAGED as error:
        raise ValueError(
            f"{path}: cannot be decoded as an image ({error!s:.200}). Give a PNG or JPEG."
        ) from error


def rgb(picture: Image.Image) -> Image.Image:
    """The picture in red, green and blue; itself where it is."""
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]. Raises as `opened_picture`."""
    with opened_picture(path) as picture:
        return np.array(rgb(picture))
