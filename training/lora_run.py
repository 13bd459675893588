"""From tasks to a LoRA dataset: what is missing is trained, in batches; what diverged, once more."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lofa_core.base_models import TargetLayer

from .config import LoRAConfig
from .data.folder_tasks import Tasks
from .denoisers import Denoiser, Prompts
from .lora_dataset import LoRAFolder, Record, Status, Task
from .lora_factory import train_loras


@dataclass(frozen=True)
class Batch:
    """Tasks that are trained together, with all that it takes beside the base model."""

    folder: Path  # of the LoRA files
    metadata: dict[str, dict[str, str]]  # task id -> what its file says
    clips: dict[str, Tensor]  # task id -> unit latents [n, C, ...]
    prompt: Prompts  # that all tasks train under, one row
    settings: LoRAConfig


# Trains batches, here or elsewhere, in any order; writes their LoRA files and yields each batch's records.
Trainer = Callable[[Iterable[Batch]], Iterator[list[Record]]]


def train_batch(denoiser: Denoiser, layers: tuple[TargetLayer, ...], batch: Batch) -> list[Record]:
    """Train a batch and write the files of what did not diverge. The manifest is left to the caller."""
    names, folder = [layer.name for layer in layers], LoRAFolder(batch.folder)
    settings, records = recorded(batch.settings), []
    trained = train_loras(denoiser, layers, batch.clips, batch.prompt, batch.settings)
    for task, lora in trained.items():
        if lora.divergence:
            records.append(Record(task, "diverged", reason=lora.divergence, settings=settings))
        else:
            file, sha256 = folder.write(batch.metadata[task], names, lora.A, lora.B)
            records.append(Record(task, "done", file, sha256, lora.loss, settings=settings))
    return records


def recorded(settings: LoRAConfig) -> dict[str, Any]:
    """What a manifest line says of the settings: all that the LoRA depends on."""
    values = asdict(settings)
    del values["tasks_at_once"]
    return values


def train_here(data: Tasks, device: torch.device) -> Trainer:
    """A trainer in this process."""

    def train(batches: Iterable[Batch]) -> Iterator[list[Record]]:
        denoiser = data.load_denoiser()
        denoiser.model.to(device)
        for batch in batches:
            yield train_batch(denoiser, data.weights.model.layers, batch)

    return train


@dataclass(frozen=True)
class Summary:
    """What became of a dataset's tasks, by id."""

    folder: Path
    skipped: tuple[str, ...]  # valid before
    done: tuple[str, ...]  # trained now, at once or in the second attempt
    retried: tuple[str, ...]  # diverged at first; now done or failed
    failed: dict[str, str]  # with the reason

    def __str__(self) -> str:
        counts = (
            f"{len(self.done)} trained, {len(self.skipped)} were there, {len(self.retried)} tried again at "
            f"half the learning rate, {len(self.failed)} failed"
        )
        return f"{self.folder}: {counts}" + "".join(f"\n  {task}: {why}" for task, why in self.failed.items())


def make_dataset(
    folder: LoRAFolder,
    tasks: Sequence[Task],
    latents: Callable[[], Callable[[Task], Tensor]],
    prompt: Prompts,
    settings: LoRAConfig,
    train: Trainer,
    accelerator: Accelerator,
    say: Callable[[str], None] = lambda words: None,
) -> Summary:
    """Train the tasks that have no valid LoRA in the folder; what diverges, once more at half the rate.

    `latents` is asked only if something is missing; what it gives has a task's unit latents [n, C, ...].
    `prompt`: what all tasks train under, one row. An accelerator's processes share the tasks. A task's LoRA
    does not depend on which tasks share its batch, beyond rounding. Raises ValueError where the folder's
    LoRAs were trained with other settings.
    """
    if accelerator.is_main_process:
        folder.prepare()
    accelerator.wait_for_everyone()
    valid = folder.valid()
    _check_settings(folder, valid.values(), settings)
    missing = {task.id: task for task in tasks if task.id not in valid}
    accelerator.wait_for_everyone()  # nobody adds a line before all have read them
    own = list(missing)[accelerator.process_index :: accelerator.num_processes]
    half = replace(settings, learning_rate=settings.learning_rate / 2)
    if missing:
        latents_of = latents()

        def attempt(names: list[str], settings: LoRAConfig, otherwise: Status) -> list[str]:
            chosen = [missing[name] for name in names]
            batches = _batches(folder.path, chosen, latents_of, prompt, settings)
            return _attempt(folder, train(batches), len(names), otherwise, say) if names else []

        attempt(attempt(own, settings, "diverged"), half, "failed")
    accelerator.wait_for_everyone()
    records = {task: record for task, record in folder.records().items() if task in missing}
    return Summary(
        folder.path,
        skipped=tuple(task.id for task in tasks if task.id in valid),
        done=tuple(task for task in missing if records[task].status == "done"),
        retried=tuple(
            task for task in missing if records[task].settings["learning_rate"] == half.learning_rate
        ),
        failed={task: str(record.reason) for task, record in records.items() if record.status == "failed"},
    )


def _batches(
    folder: Path,
    tasks: Sequence[Task],
    latents: Callable[[Task], Tensor],
    prompt: Prompts,
    settings: LoRAConfig,
) -> Iterator[Batch]:
    size = settings.tasks_at_once
    for start in range(0, len(tasks), size):
        chosen = tasks[start : start + size]
        yield Batch(
            folder,
            {task.id: {"task": task.id} | task.metadata() for task in chosen},
            {task.id: latents(task) for task in chosen},
            prompt,
            settings,
        )


def _attempt(
    folder: LoRAFolder,
    results: Iterator[list[Record]],
    count: int,
    otherwise: Status,
    say: Callable[[str], None],
) -> list[str]:
    """Write `count` tasks' manifest lines as they come; returns those that diverged, there `otherwise`."""
    diverged: list[str] = []
    finished = 0
    for records in results:
        again = [record.task for record in records if record.status == "diverged"]
        folder.append(replace(r, status=otherwise) if r.task in again else r for r in records)
        diverged += again
        finished += len(records)
        losses = [record.loss for record in records if record.loss is not None]
        words = f"{folder.path.name}: {finished} of {count} tasks"
        if losses:
            words += f", flow-matching loss {sum(losses) / len(losses):.4f}"
        if len(losses) < len(records):
            words += f", {len(records) - len(losses)} without a LoRA"
        say(words)
    return diverged


def _check_settings(folder: LoRAFolder, records: Iterable[Record], settings: LoRAConfig) -> None:
    """One dataset, one way of training: A of another start or rank would not be comparable."""
    for record in records:
        for name, wanted in recorded(settings).items():
            found = record.settings.get(name, wanted)
            if found != wanted and (name != "learning_rate" or found != wanted / 2):
                raise ValueError(
                    f"{folder.path}: its LoRAs were trained with {name} = {found}, the configuration says "
                    f"{wanted}. Remove the folder to train them anew, or give the run another `out`."
                )
