"""Files that are written whole or not at all."""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; what is written there takes its name at the end. Where that fails,
    whatever had the name still has it.

    Raises OSError naming `path`, also for what safetensors and torch.save raise when the disk is full.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise not_written(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def not_written(path: Path, error: Exception) -> OSError:
    """What to raise where writing `path` ended in an OSError, or in the SafetensorError of safetensors or the
    RuntimeError of torch.save, which stand in its place and do not name the file.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, str(path))
    free = shutil.disk_usage(path.parent).free / 2**20
    return OSError(
        f"{path} could not be written ({error}); the disk has {free:.0f} MB free. What was there before is "
        "unchanged: make room, and run it again."
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text file."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file's content."""
    with whole_file(target) as unfinished:
        shutil.copyfile(source, unfinished)


def cleared(path: Path) -> Path:
    """`path`, after what killed programs have left of writing it is gone. Nobody else may be writing it."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*"):
        unfinished.unlink(missing_ok=True)
    return path
