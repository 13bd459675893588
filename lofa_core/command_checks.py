"""What the commands check alike: their outputs' names and their device."""

from collections.abc import Sequence
from pathlib import Path

import torch


def check_outputs(outputs: Sequence[tuple[Path | None, str]], inputs: Sequence[Path | None]) -> None:
    """Refuse, before any work, files that could not be written or would overwrite an input.

    `outputs`: (path, the suffix it must have).
    """
    taken = {path.resolve() for path in inputs if path is not None}
    for path, suffix in outputs:
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise ValueError(f"{path}: the name of this output must end in {suffix}.")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist. Make it first.")
        if path.is_dir():
            raise ValueError(f"{path}: is a folder. Name a file.")
        if path.resolve() in taken:
            raise ValueError(
                f"{path}: is also another file of this command. Give each output a name of its own."
            )
        taken.add(path.resolve())


def find_device(name: str | None) -> torch.device:
    """The device of that name; without one, the GPU where there is one. ValueError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: unknown; expected cpu, cuda, cuda:1 or mps.") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        raise ValueError(f"--device {name}: this computer has no such device, or this PyTorch cannot use it.")
    return device
