"""A disk that can really be filled: a small tmpfs."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk(place: Path, size: int):
    """An empty disk of `size` bytes, mounted at `place`."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here (it takes root, and Linux)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, free: int) -> Path:
    """Leave that many bytes of a disk; the file that takes the rest."""
    ballast = place / "ballast"
    rest = shutil.disk_usage(place).free - free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, rest))
    return ballast
