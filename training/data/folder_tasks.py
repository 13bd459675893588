"""A folder dataset as the training stages ask for it, out of the cache alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lofa_core import miniature
from lofa_core.base_models import WAN_IMAGE_KINDS, open_safetensors
from lofa_core.descriptions import BaseDescription, ConditionDescription

from ..backbones import fold_padding
from ..config import DataConfig
from ..miniature.tasks import MiniatureTasks
from ..over_base import OverBase
from .cache import INDEX, encoders_fingerprint, read_cached, settings_of
from .task_folder import Task

_WITH_A_CAPTION = 0.3  # share of training sentences that are a clip's caption, where there are any


@dataclass(frozen=True)
class TaskName:
    """A task as the stages pass it around. Prints as its id."""

    id: str

    def __str__(self) -> str:
        return self.id


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
        with open_safetensors(path) as file:
            return file.get_slice("latents")[row : row + 1]


class FolderClips:
    """Clips of some tasks, those of a task beside each other."""

    def __init__(self, folder: Path, tasks: Mapping[TaskName, Task]):
        paths = {name: folder / f"{name}.safetensors" for name in tasks}
        self.latents = CachedLatents(
            [(paths[name], row) for name, task in tasks.items() for row in range(len(task.clips))]
        )
        self._owners = [name for name, task in tasks.items() for _ in task.clips]

    def of(self, task: TaskName) -> Tensor:
        """Indices of a task's clips."""
        return torch.tensor([index for index, owner in enumerate(self._owners) if owner == task])

    def action_weights(self) -> Tensor:
        """Weights [C, T, H, W] of a loss on the latents: ones. Where a task shows is not known here."""
        return torch.ones(self.latents[torch.tensor([0])].shape[1:])


class FolderTasks(OverBase):
    """What MiniatureTasks is to the stages, for a folder dataset that `cache` has encoded for a WAN2.1 base.

    Raises ValueError for a base that cannot be trained on; whatever needs the cache raises ValueError where
    it is missing or was made with other settings.
    """

    def __init__(self, config: DataConfig, folder: Path, base: Path):
        super().__init__(base)
        self.config, self.folder = config, folder
        model = self.weights.model
        if not model.name.startswith("WAN2.1") or any(x.kind in WAN_IMAGE_KINDS for x in model.layers):
            raise ValueError(
                f"{base}: is {model.name}. A folder dataset can be trained for WAN2.1's text-to-video models "
                "only so far."
            )
        self._fingerprint = encoders_fingerprint(base)

    @cached_property
    def _tasks(self) -> dict[TaskName, Task]:
        index = self.folder / "cache" / INDEX
        if not index.is_file():
            raise ValueError(f"{self.folder}: {self.config.folder} is not cached here. Run `cache` first.")
        kept = json.loads(index.read_text(encoding="utf-8"))
        for name, wanted in settings_of(self.config, self._fingerprint).items():
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

    @cached_property
    def clips(self) -> FolderClips:
        """The training tasks' clips."""
        return FolderClips(self.folder / "cache", self._of("training"))

    @cached_property
    def clips_by_action(self) -> dict[TaskName, Tensor]:
        """Indices into `clips`."""
        return {task: self.clips.of(task) for task in self.training}

    def held_out_clips(self, each: int, offset: int = 0) -> FolderClips:
        """The held-out tasks' clips: all there are. A world draws `each` of them from seeds by `offset`."""
        return FolderClips(self.folder / "cache", self._of("held_out"))

    def descriptions(self) -> tuple[BaseDescription, ConditionDescription]:
        """What a hypernetwork trained on these tasks is for."""
        condition = ConditionDescription("text", self.coarse().shape[-1], coarse_prompt=self.coarse_prompt)
        return self.base_description(), condition

    def sentence(self, action: TaskName, rng: np.random.Generator) -> str:
        """A training sentence: the task's prompt, now and then the caption of one of its clips."""
        captions = [clip.caption for clip in self._tasks[action].clips if clip.caption]
        if captions and rng.random() < _WITH_A_CAPTION:
            return captions[rng.integers(len(captions))]
        return self._tasks[action].prompt

    def plain_sentence(self, action: TaskName, rng: np.random.Generator) -> str:
        """The task's prompt."""
        return self._tasks[action].prompt

    @property
    def coarse_prompt(self) -> str:
        return next(iter(self._tasks.values())).coarse_prompt

    def prompts(self, sentences: list[str]) -> Tensor:
        """Cached states with the folded padding row, float32 [B, S + 1, d]. KeyError for another text."""
        rows = [self._states(sentence) for sentence in sentences]
        return fold_padding(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))

    def conditions(self, sentences: list[str]) -> Tensor:
        """Condition tokens [B, S, d], zero rows after each sentence's end."""
        return self.prompts(sentences)[:, :-1]

    def coarse(self) -> Tensor:
        """The coarse prompt's folded states [1, S + 1, d]."""
        return self.prompts([self.coarse_prompt])

    def _states(self, sentence: str) -> Tensor:
        name, key = self._places[sentence]
        with open_safetensors(self.folder / "cache" / f"{name}.safetensors") as file:
            return file.get_tensor(key).float()

    @cached_property
    def _places(self) -> dict[str, tuple[TaskName, str]]:
        """Text -> the file that holds its states, and the key there."""
        places = {}
        for name, task in self._tasks.items():
            keys = {f"captions.{row}": clip.caption for row, clip in enumerate(task.clips) if clip.caption}
            for key, text in (keys | {"prompt": task.prompt, "coarse_prompt": task.coarse_prompt}).items():
                places[text] = name, key
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
