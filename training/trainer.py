"""The loop that both stages share: order of the data, checkpoints, logs, and going on after any end.

Everything random in a step follows from (seed, step, item): there is no state to lose between two runs, and
items fall to any number of processes without changing what they are.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from lofa_core.whole_files import not_written

from .config import StageConfig
from .optimisers import MuonAdamW, set_learning_rate, warm_up_and_cosine

KEPT = 2  # checkpoints: the last, and the one before it to go back to by hand
_FREE = ("checkpoint_every", "validate_every")  # settings that may differ from a checkpoint's
_EMBEDDINGS = ("embedding", "patch_embed", "position", "cls_token", "pooling_queries")


class Stage(Protocol):
    """What is trained."""

    name: str
    settings: StageConfig
    module: nn.Module  # what is trained, and what a forward pass of `losses` calls (wrapped, under DDP)
    weights: dict[str, float]  # of the losses in their sum

    def tasks(self, step: int, items: Sequence[int]) -> list[str]:
        """Names of the tasks that these items of a step are."""
        ...

    def losses(self, model: nn.Module, step: int, items: Sequence[int]) -> dict[str, Tensor]:
        """Each loss as its mean over these items."""
        ...

    def after_step(self, step: int) -> None:
        """Called when the weights have moved."""
        ...

    def state(self) -> list[Any]:
        """Further objects with a state_dict that belong into a checkpoint."""
        ...

    def validate(self) -> dict[str, float]:
        """Measures on held-out tasks, on the main process."""
        ...


def draw(seed: int, step: int, item: int | None = None) -> np.random.Generator:
    """What decides an item of a step, or what is common to the whole step."""
    return np.random.default_rng([seed, step, 0 if item is None else 1 + item])


def noise_from(rng: np.random.Generator) -> torch.Generator:
    """PyTorch's generator for the noise of the same item."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def follow(average: nn.Module, trained: nn.Module, step: int, decay: float) -> None:
    """Move an exponential average of weights on by one step, faster in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for kept, new in zip(average.parameters(), trained.parameters(), strict=True):
            kept.lerp_(new, 1.0 - decay)


def train(
    stage: Stage,
    settings: StageConfig,
    folder: Path,
    accelerator: Accelerator,
    console: Console,
    stop_after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train `stage` in place to `settings.steps`, from the last checkpoint in `folder` where there is one.

    Writes folder/checkpoints, folder/losses.jsonl (every step) and folder/tensorboard. Raises ValueError
    where the checkpoint was made under other settings, or a loss is not finite (weights and checkpoint are
    those before that step). `stop_after` is called after each step.
    """
    if settings.tasks % (accelerator.num_processes * settings.accumulate):
        raise ValueError(
            f"[{stage.name}] tasks = {settings.tasks} cannot be shared by {accelerator.num_processes} "
            f"processes in {settings.accumulate} parts each. Choose a multiple of their product."
        )
    optimiser = _optimiser(stage.module, settings)
    model, optimiser = accelerator.prepare(stage.module, optimiser)
    for extra in stage.state():
        accelerator.register_for_checkpointing(extra)
    checkpoints = Checkpoints(folder / "checkpoints", accelerator)
    first = checkpoints.load_last(settings)
    mine = range(accelerator.process_index, settings.tasks, accelerator.num_processes)
    parts = [mine[part :: settings.accumulate] for part in range(settings.accumulate)]
    with _Log(folder, first, settings.steps, stage.name, accelerator, console) as log:
        for step in range(first, settings.steps):
            losses = _backward(stage, model, step, parts, accelerator, settings.precision == "bfloat16")
            _stop_if_not_finite(losses, stage, step, settings.tasks, checkpoints)
            accelerator.clip_grad_norm_(model.parameters(), settings.clip)
            set_learning_rate(optimiser, settings.learning_rate * _factor(settings, step))
            optimiser.step()
            optimiser.zero_grad()
            stage.after_step(step)
            done = step + 1
            log.step(done, losses)
            if settings.validate_every and (done % settings.validate_every == 0 or done == settings.steps):
                if accelerator.is_main_process:
                    log.validation(done, stage.validate())
                accelerator.wait_for_everyone()
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                log.flush()
                checkpoints.save(done, asdict(settings))
            stop_after(done)


def _backward(
    stage: Stage, model: nn.Module, step: int, parts: list[range], accelerator: Accelerator, bfloat16: bool
) -> dict[str, float]:
    """Gradients of the step's loss, averaged over parts and processes; each loss's global mean."""
    totals: dict[str, Tensor] = {}
    for number, items in enumerate(parts):
        last = number == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bfloat16):
                losses = stage.losses(model, step, items)
                loss = sum(stage.weights[name] * value for name, value in losses.items())
            accelerator.backward(loss / len(parts))
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float() / len(parts)
    values = accelerator.reduce(torch.stack(list(totals.values())), "mean")
    found = dict(zip(totals, values.tolist(), strict=True))
    return {"loss": sum(stage.weights[name] * value for name, value in found.items()), **found}


def _stop_if_not_finite(
    losses: dict[str, float], stage: Stage, step: int, tasks: int, checkpoints: "Checkpoints"
) -> None:
    if all(math.isfinite(value) for value in losses.values()):
        return
    said = ", ".join(f"{name} {value}" for name, value in losses.items())
    last = checkpoints.last()
    raise ValueError(
        f"[{stage.name}] step {step + 1}: {said}. Its tasks: {', '.join(stage.tasks(step, range(tasks)))}. "
        + (f"To go on from {last}, " if last else "There is no checkpoint yet; ")
        + "lower learning_rate or take out the task whose data is damaged, and run the same command again."
    )


def _factor(settings: StageConfig, step: int) -> float:
    if settings.schedule == "cosine":
        return warm_up_and_cosine(step, settings.steps, settings.warm_up)
    return min(1.0, (step + 1) / max(1, settings.warm_up))


def _optimiser(module: nn.Module, settings: StageConfig) -> torch.optim.Optimizer:
    if settings.optimiser == "muon":
        return MuonAdamW(module, settings.learning_rate, adamw_names=_EMBEDDINGS)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )


class Checkpoints:
    """Whole states of a run, written beside their place and then moved: one that is there is complete."""

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator

    def clear(self) -> None:
        """Remove what was never finished, or removed by half."""
        for unfinished in self.folder.glob("unfinished-*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def last(self) -> Path | None:
        """The newest one, None where there is none."""
        found = sorted(self.folder.glob("step-*"))
        return found[-1] if found else None

    def load_last(self, settings: StageConfig) -> int:
        """Take up the newest checkpoint; the number of steps done. ValueError where settings differ. A key
        that came after the checkpoint had its default: that is what was done before there was such a key.
        """
        if self.accelerator.is_main_process:
            self.clear()
        path = self.last()
        if path is None:
            return 0
        defaults = asdict(type(settings)())
        kept = defaults | json.loads((path / "settings.json").read_text(encoding="utf-8"))
        for name, value in asdict(settings).items():
            if name not in _FREE and kept[name] != value:
                raise ValueError(
                    f"{path} was made with {name} = {kept[name]}, the configuration says {value}. "
                    "Put the value back to go on, or name another `out` to start anew."
                )
        self.accelerator.load_state(str(path))
        return int(path.name.removeprefix("step-"))

    def save(self, steps: int, settings: dict[str, Any]) -> None:
        """Write the state after `steps` steps. OSError where the disk is full; the ones before are whole."""
        place = self.folder / f"step-{steps:07}"
        unfinished = self.folder / f"unfinished-{steps:07}"
        try:
            if self.accelerator.is_main_process:
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(unfinished))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (unfinished / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
                unfinished.rename(place)
        except (OSError, SafetensorError, RuntimeError) as error:
            self.clear()  # to give the space back
            raise not_written(place, error) from error
        if self.accelerator.is_main_process:
            for old in sorted(self.folder.glob("step-*"))[:-KEPT]:
                old.rename(old.with_name(f"unfinished-{old.name}"))  # removed by half it must not look whole
            self.clear()
        self.accelerator.wait_for_everyone()


class _Log:
    """losses.jsonl, TensorBoard, and a progress bar or, where there is no terminal, a line now and then."""

    def __init__(
        self, folder: Path, first: int, steps: int, name: str, accelerator: Accelerator, console: Console
    ):
        self.main, self.console, self.name, self.steps = accelerator.is_main_process, console, name, steps
        self.path, self.first = folder / "losses.jsonl", first
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"),
        )  # fmt: skip
        self.bar = Progress(*columns, console=console, disable=not (self.main and console.is_terminal))
        self.task = self.bar.add_task(name, total=steps, completed=first, loss="")
        self.every = max(1, steps // 20)

    def __enter__(self) -> "_Log":
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._forget_what_comes_again()
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
            self.writer = SummaryWriter(self.path.parent / "tensorboard", purge_step=self.first + 1)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.main:
            self.file.close()
            self.writer.close()

    def _forget_what_comes_again(self) -> None:
        """Drop the lines after the checkpoint: those steps are done again."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()[: self.first]
            shortened = self.path.with_suffix(".shortened")
            shortened.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            shortened.replace(self.path)

    def step(self, done: int, losses: dict[str, float]) -> None:
        if not self.main:
            return
        self.file.write(json.dumps({"step": done, **losses}) + "\n")
        for name, value in losses.items():
            self.writer.add_scalar(f"{self.name}/{name}", value, done)
        self.bar.update(self.task, completed=done, loss=f"{losses['loss']:.4f}")
        if not self.console.is_terminal and (done % self.every == 0 or done == self.steps):
            said = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            self.console.print(f"{self.name} step {done} of {self.steps}  {said}", soft_wrap=True)

    def validation(self, done: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(f"{self.name}/held_out/{name}", value, done)
        said = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.console.print(f"{self.name} step {done}, held-out tasks: {said}", soft_wrap=True)

    def flush(self) -> None:
        if self.main:
            self.writer.flush()
