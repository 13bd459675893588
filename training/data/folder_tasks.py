"""A folder dataset as the training stages ask for it, out of the cache alone."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lofa_core import miniature
from lofa_core.conditions import Conditions, Given
from lofa_core.descriptions import BaseDescription, ConditionDescription
from lofa_core.safetensors_file import open_safetensors

from ..config import DataConfig
from ..denoisers import Prompts
from ..miniature.tasks import MiniatureTasks
from ..over_base import OverBase
from ..told import NOTHING, picture_count, some_kinds
from .base_encoders import Text, encoders_of
from .cache import INDEX, read_cached, settings_of
from .task_encoder import fingerprint
from .task_folder import Task

_WITH_A_CAPTION = 0.3  # share of training sentences that are a clip's caption, where there are any


@dataclass(frozen=True)
class TaskName:
    """A task as the stages pass it around. Prints as its id."""

    id: str

    def __str__(self) -> str:
        return self.id

    def metadata(self) -> dict[str, str]:
        """What its LoRA's file says about it, besides the id."""
        return {}


class CachedLatents:
    """All clips' unit latents [N, C, T, H, W]; what is asked for is read from the files, the rest stays
    there.
    """

    def __init__(self, places: Sequence[tuple[Path, int]]):
        self._places = places  # file and row of each clip

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, picks: Tensor) -> Tensor:
        """float16 [n, C, T, H, W] for indices [n]."""
        return torch.cat([self._row(*self._places[pick]) for pick in picks.tolist()])

    @staticmethod
    def _row(path: Path, row: int) -> Tensor:
        return open_safetensors(path).rows("latents", row, row + 1)


class FolderTasks(OverBase):
    """What MiniatureTasks is to the stages, for a folder dataset that `cache` has encoded for its base.

    All kinds of condition that a task has describe all of it. Raises ValueError for a base that cannot be
    trained on; whatever needs the cache raises ValueError where it is missing or was made with other
    settings.
    """

    def __init__(self, config: DataConfig, folder: Path, base: Path):
        super().__init__(base, config.more_bases)
        self.config, self.folder = config, folder
        self.kinds = config.conditions
        self._encoders = encoders_of(base, self.weights.model, config.frames)
        self._made_with = fingerprint(config, base, self._encoders)

    @cached_property
    def _tasks(self) -> dict[TaskName, Task]:
        index = self.folder / "cache" / INDEX
        if not index.is_file():
            raise ValueError(f"{self.folder}: {self.config.folder} is not cached here. Run `cache` first.")
        kept = json.loads(index.read_text(encoding="utf-8"))
        for name, wanted in settings_of(self.config, self._made_with).items():
            if kept.get(name) != wanted:
                raise ValueError(
                    f"{index.parent} was made with {name} = {kept.get(name)}, now it is {wanted}. "
                    "Run `cache` again."
                )
        tasks = {}
        for name in kept["tasks"]:
            found = read_cached(index.parent / f"{name}.safetensors")
            if found is None:
                raise ValueError(f"{index.parent}: {name}.safetensors is missing. Run `cache` again.")
            tasks[TaskName(name)] = found[1]
        return tasks

    def _of(self, split: str) -> dict[TaskName, Task]:
        return {name: task for name, task in self._tasks.items() if task.split == split}

    @cached_property
    def training(self) -> list[TaskName]:
        return list(self._of("training"))

    @cached_property
    def held_out(self) -> list[TaskName]:
        return list(self._of("held_out"))

    def sorts(self) -> list[list[TaskName]]:
        """The training tasks; they are all of one sort."""
        return [self.training]

    @cached_property
    def clips(self) -> CachedLatents:
        """All tasks' clips, those of a task beside each other."""
        folder = self.folder / "cache"
        return CachedLatents(
            [
                (folder / f"{name}.safetensors", row)
                for name, task in self._tasks.items()
                for row in range(len(task.clips))
            ]
        )

    @cached_property
    def _clips_of(self) -> dict[TaskName, Tensor]:
        """Indices into `clips`."""
        found, first = {}, 0
        for name, task in self._tasks.items():
            found[name] = torch.arange(first, first + len(task.clips))
            first += len(task.clips)
        return found

    def latents_of(self, task: TaskName) -> Tensor:
        """All its unit latents, float16 [n, C, T, H, W]."""
        return self.clips[self._clips_of[task]]

    def some_latents(self, task: TaskName, count: int, rng: np.random.Generator) -> Tensor:
        """`count` of them, drawn with replacement."""
        clips = self._clips_of[task]
        return self.clips[clips[torch.from_numpy(rng.integers(len(clips), size=count))]]

    def pictures(self, latents: Tensor) -> np.ndarray:
        """Unit latents [N, C, ...] -> frames uint8 [N, T, H, W, 3]."""
        return self._encoders(self.base, torch.device("cpu")).pictures(latents)

    def held_out_latents(self, each: int, repeat: int = 0) -> Callable[[TaskName], Tensor]:
        """Those that the held-out tasks' own LoRAs are trained on: all there are. A world draws `each`, and
        others for another `repeat`.
        """
        return self.latents_of

    def loss_weights(self, task: TaskName) -> Tensor:
        """Weights [C, T, H, W] of a loss on the latents: ones. Where a task shows is not known here."""
        return self._ones

    @cached_property
    def _ones(self) -> Tensor:
        return torch.ones(self.clips[torch.tensor([0])].shape[1:])

    def draw_task(self, rng: np.random.Generator) -> TaskName:
        """A training task."""
        return self.training[rng.integers(len(self.training))]

    def condition(self, task: TaskName, rng: np.random.Generator) -> dict[str, Any]:
        """A training condition of a task, drawn: a sentence, a pose and pictures by their places among the
        task's own.
        """
        kinds = self._tasks[task].kinds(self.kinds)
        if len(self.kinds) > 1:
            kinds = [] if rng.random() < NOTHING else some_kinds(kinds, rng)
        return {kind: self._told(task, kind, rng) for kind in kinds}

    def plain_condition(self, task: TaskName, rng: np.random.Generator) -> dict[str, Any]:
        """What describes a task best: its prompt, the first of its poses and pictures."""
        return {
            kind: self.plain_sentence(task, rng) if kind == "text" else (task, [0])
            for kind in self._tasks[task].kinds(self.kinds)
        }

    def _told(self, task: TaskName, kind: str, rng: np.random.Generator) -> str | tuple[TaskName, list[int]]:
        if kind == "text":
            return self.sentence(task, rng)
        there = len(getattr(self._tasks[task], kind))
        count = 1 if kind == "pose" else min(there, picture_count(rng))
        return task, rng.permutation(there)[:count].tolist()

    def conditions(self, told: list[dict[str, Any]]) -> Conditions:
        """What `condition` drew for B tasks, encoded. Kinds that are told of none of them are left out, all
        but one where nothing is told.
        """
        kinds = [kind for kind in self.kinds if any(kind in one for one in told)] or self.kinds[:1]
        found = {}
        for kind in kinds:
            rows = [self._values(kind, one[kind]) if kind in one else self._silence[kind] for one in told]
            values = torch.stack(rows) if kind == "pose" else pad_sequence(rows, batch_first=True)
            strength = torch.tensor([float(kind in one) for one in told])
            found[kind] = Given(values, strength if len(self.kinds) > 1 else None)
        return found

    def _values(self, kind: str, told: str | tuple[TaskName, list[int]]) -> Tensor:
        """Of one task: text states, or those of pictures one after the other [S, d]; a pose [3, T, H, W]."""
        if isinstance(told, str):
            return self._text(told)["states"].float()
        task, picks = told
        file = open_safetensors(self._file(task))
        rows = torch.cat([file.rows(kind, pick, pick + 1) for pick in picks]).float()
        return rows[0] / 255.0 if kind == "pose" else rows.flatten(0, 1)

    @cached_property
    def _silence(self) -> dict[str, Tensor]:
        """Values of kinds that are not told: their strength is zero."""
        return {
            known.kind: torch.zeros(3, *known.size) if known.size else torch.zeros(1, known.width)
            for known in self._known
        }

    def descriptions(self) -> tuple[BaseDescription, tuple[ConditionDescription, ...]]:
        """What a hypernetwork trained on these tasks is for."""
        return self.base_description(), self._known

    @cached_property
    def _known(self) -> tuple[ConditionDescription, ...]:
        size = self.config.pose_frames, self.config.pose_size, self.config.pose_size
        known = []
        for kind in self.kinds:
            if kind == "pose":
                known.append(ConditionDescription(kind, 3, coarse_prompt=self.coarse_prompt, size=size))
            else:
                key = "coarse_prompt" if kind == "text" else kind
                task = next(name for name, task in self._tasks.items() if kind in task.kinds(self.kinds))
                width = open_safetensors(self._file(task)).shape(key)[-1]
                known.append(ConditionDescription(kind, width, coarse_prompt=self.coarse_prompt))
        return tuple(known)

    def without_prompt(self) -> list[TaskName]:
        """The training tasks that the base model cannot be told in words."""
        return [name for name, task in self._of("training").items() if not task.prompt]

    def sentence(self, task: TaskName, rng: np.random.Generator) -> str:
        """A training sentence: the task's prompt, now and then the caption of one of its clips."""
        captions = [clip.caption for clip in self._tasks[task].clips if clip.caption]
        if captions and rng.random() < _WITH_A_CAPTION:
            return captions[rng.integers(len(captions))]
        return self._tasks[task].prompt

    def plain_sentence(self, task: TaskName, rng: np.random.Generator) -> str:
        """The task's prompt; where it has none, the coarse one."""
        return self._tasks[task].prompt or self.coarse_prompt

    @property
    def coarse_prompt(self) -> str:
        return next(iter(self._tasks.values())).coarse_prompt

    def prompts(self, sentences: list[str]) -> Prompts:
        """Cached texts as the base model reads them, float32. KeyError for another text."""
        return self._encoders.prompts([self._text(sentence) for sentence in sentences])

    def coarse(self) -> Prompts:
        """The coarse prompt, one row."""
        return self.prompts([self.coarse_prompt])

    def _file(self, task: TaskName) -> Path:
        return self.folder / "cache" / f"{task}.safetensors"

    def _text(self, sentence: str) -> Text:
        name, key = self._places[sentence]
        file = open_safetensors(self._file(name))
        parts = {"states": key, "pooled": f"{key}.pooled"}
        return {part: file.tensor(key) for part, key in parts.items() if key in file}

    @cached_property
    def _places(self) -> dict[str, tuple[TaskName, str]]:
        """Text -> the file that holds its states, and the key there."""
        places = {}
        for name, task in self._tasks.items():
            texts = {"prompt": task.prompt, "coarse_prompt": task.coarse_prompt}
            if "text" in self.kinds:
                texts |= {f"captions.{row}": clip.caption for row, clip in enumerate(task.clips)}
            places |= {text: (name, key) for key, text in texts.items() if text}
        return places


Tasks = MiniatureTasks | FolderTasks


def open_tasks(base: str, config: DataConfig, folder: Path) -> Tasks:
    """The tasks of a configuration; `folder` is the run's. ValueError for a base they cannot live in."""
    if config.folder:
        return FolderTasks(config, folder, miniature.FOLDER if base == "miniature" else Path(base))
    if base != "miniature":
        raise ValueError(
            f'base = "{base}": without data.folder the tasks are those of the miniature\'s world, which only '
            'the base "miniature" knows.'
        )
    return MiniatureTasks(config, folder)
