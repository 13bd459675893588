"""Checkpoints of a training run: weights, optimiser and step, so that a killed run goes on where it was."""

from pathlib import Path

import torch
from torch import nn

EVERY = 100  # steps


def due(step: int, steps: int) -> bool:
    """Whether a checkpoint is written after `step` (from 0) of `steps`."""
    return (step + 1) % EVERY == 0 or step == steps - 1


def save(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, step: int, **more) -> None:
    """Write whole or not at all, after `step` (from 0)."""
    known = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1, **more}
    partial = path.with_suffix(".partial")
    torch.save(known, partial)
    partial.replace(path)


def resume(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict:
    """Load what `save` wrote into model and optimiser and return all of it; step 0 where there is no file."""
    if not path.exists():
        return {"step": 0}
    known = torch.load(path, weights_only=True)
    model.load_state_dict(known["model"])
    optimiser.load_state_dict(known["optimiser"])
    return known
