"""The `cache` step: a task's clips, texts, poses and pictures encoded once, a file to a task.

<run>/cache/<task id>.safetensors holds `latents` float16 [N, C, ...] of N clips; text states [S, d] as the
base's encoder gives them, `prompt`, `coarse_prompt`, and `captions.<i>` where clip i has a caption, for SDXL
each with its `.pooled`; and of each kind asked for `pose` uint8 [n, 3, T, H, W] or the states of n pictures,
`style` and `identity` float16 [n, S, d].
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import track

from lofa_core.base_models import BaseWeights
from lofa_core.lora_files import write_safetensors
from lofa_core.safetensors_file import open_safetensors
from lofa_core.whole_files import cleared, write_whole

from ..config import DataConfig
from . import published
from .base_encoders import encoders_of
from .task_encoder import TaskEncoder, fingerprint
from .task_folder import CONDITION_FILES, Clip, Problem, Task, read_task_folder

INDEX = "tasks.json"  # which tasks the cache holds, and of what; written last
REPORT = "data_report.json"
_FORMAT = 2  # changes where what is written changes
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class CacheSummary:
    """What became of a dataset's tasks, by id."""

    folder: str
    training: tuple[str, ...]
    held_out: tuple[str, ...]
    clips: int
    encoded: tuple[str, ...]  # now
    unchanged: tuple[str, ...]  # before
    conditions: dict[str, int]  # kind asked for -> number of training tasks that have it
    problems: tuple[Problem, ...]

    def report(self) -> dict:
        """What data_report.json says."""
        values = asdict(self)
        return values | {"left_out": values.pop("problems")}

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {len(self.training)} training and {len(self.held_out)} held-out tasks with "
            f"{self.clips} clips; {len(self.encoded)} encoded now, {len(self.unchanged)} were there; "
            f"{len(self.problems)} left out" + (f", see {REPORT}" if self.problems else "")
        ]
        lines += [f"  {problem.what}: {problem.reason}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        more = len(self.problems) - _SHOWN_PROBLEMS
        return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)


def cache_dataset(
    config: DataConfig, base: Path, run: Path, accelerator: Accelerator, console: Console
) -> CacheSummary:
    """Encode what is new or changed into `run`/cache and write `run`/data_report.json.

    An accelerator's processes share the tasks. Raises ValueError where nothing can be trained on, before the
    encoders are loaded if the dataset itself says so.
    """
    source = Path(config.folder)
    read = published.published_tasks if published.is_published(source) else read_task_folder
    found = read(source, config)
    folder = run / "cache"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # until all of its files are those it speaks of
        for unfinished in folder.glob(".*.safetensors.*"):
            unfinished.unlink()
    accelerator.wait_for_everyone()
    encoders = encoders_of(base, BaseWeights.open(base).model, config.frames)
    made_with = fingerprint(config, base, encoders)
    encoder = TaskEncoder(config, base, encoders(base, accelerator.device))
    mine = found.tasks[accelerator.process_index :: accelerator.num_processes]
    shown = track(mine, "cache", console=console, disable=not accelerator.is_main_process)
    outcomes = gather_object(
        [_cached(task, folder, encoder, key_of(task, config, made_with)) for task in shown]
    )
    place = {task.id: number for number, task in enumerate(found.tasks)}
    outcomes.sort(key=lambda outcome: place[outcome.task.id])
    kept = {outcome.task.id: outcome for outcome in outcomes if outcome.task.clips}
    training = [outcome.task for outcome in kept.values() if outcome.task.split == "training"]
    asked = config.conditions
    summary = CacheSummary(
        config.folder,
        tuple(task.id for task in training),
        tuple(name for name, outcome in kept.items() if outcome.task.split == "held_out"),
        sum(len(outcome.task.clips) for outcome in kept.values()),
        tuple(name for name, outcome in kept.items() if outcome.new),
        tuple(name for name, outcome in kept.items() if not outcome.new),
        {kind: sum(kind in task.kinds(asked) for task in training) for kind in asked},
        (*found.problems, *(problem for outcome in outcomes for problem in outcome.problems)),
    )
    if accelerator.is_main_process:
        for file in folder.glob("*.safetensors"):
            if file.stem not in kept:
                file.unlink()
        _write(run / REPORT, summary.report())
        console.print(str(summary), soft_wrap=True, markup=False)
    accelerator.wait_for_everyone()
    if not training:
        raise ValueError(f"{found.path}: no training task could be encoded; {run / REPORT} says why.")
    for kind, count in summary.conditions.items():
        if not count:
            name = "prompt" if kind == "text" else kind
            raise ValueError(
                f"{found.path}: no training task has a {name} that can be used, though data.conditions asks "
                f"for {kind}; {run / REPORT} says what was left out."
            )
    if accelerator.is_main_process:
        _write(folder / INDEX, {"tasks": list(kept)} | settings_of(config, made_with))
    accelerator.wait_for_everyone()
    return summary


def settings_of(config: DataConfig, made_with: str) -> dict[str, Any]:
    """What a whole cache was made with; `made_with`: the encoders' fingerprint."""
    names = ["folder", "frames", "height", "width", "fps", "coarse_prompt"]
    names += ["pose_frames", "pose_size"] if "pose" in config.conditions else []
    values = {name: getattr(config, name) for name in names}
    return values | {"conditions": list(config.conditions), "encoders": made_with, "format": _FORMAT}


def key_of(task: Task, config: DataConfig, made_with: str) -> str:
    """A hash of all that a task's cached file depends on; its files by name, size and time of change."""
    names = [clip.file for clip in task.clips]
    names += [file for kind in CONDITION_FILES for file in getattr(task, kind)]
    files = [(Path(config.folder) / name).stat() for name in names]
    content = settings_of(config, made_with) | {
        "folder": "",  # it may be moved
        "coarse_prompt": "",  # the task's own counts
        "task": asdict(task),
        "files": [(file.st_size, file.st_mtime_ns) for file in files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_cached(path: Path) -> tuple[str, Task, tuple[Problem, ...]] | None:
    """(key, the task with the clips that are in the file, what was left out); None where there is no whole
    file of this kind.
    """
    try:
        metadata = open_safetensors(path).metadata
        values = json.loads(metadata["task"])
        clips = tuple(Clip(**clip) for clip in values.pop("clips"))
        values |= {kind: tuple(values[kind]) for kind in CONDITION_FILES}
        problems = tuple(Problem(**problem) for problem in json.loads(metadata["problems"]))
        return metadata["key"], Task(clips=clips, **values), problems
    except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class _Outcome:
    task: Task  # with the clips that were encoded; none: the task is left out
    new: bool
    problems: tuple[Problem, ...]


def _cached(task: Task, folder: Path, encoder: TaskEncoder, key: str) -> _Outcome:
    """The task's valid file as it is, or a new one."""
    path = folder / f"{task.id}.safetensors"
    before = read_cached(path)
    if before is not None and before[0] == key:
        return _Outcome(before[1], False, before[2])
    problems: list[Problem] = []
    tensors, task = encoder.encode(task, lambda what, reason: problems.append(Problem(what, reason)))
    if task.clips:
        said = [asdict(problem) for problem in problems]
        metadata = {"key": key, "task": json.dumps(asdict(task)), "problems": json.dumps(said)}
        write_safetensors(tensors, path, metadata)
    return _Outcome(task, True, tuple(problems))


def _write(path: Path, values: dict) -> None:
    write_whole(cleared(path), json.dumps(values, indent=1, ensure_ascii=False) + "\n")
