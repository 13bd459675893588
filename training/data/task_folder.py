"""A dataset in one layout: a folder with tasks.jsonl, a task to a line; docs/DATA.md shows it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lofa_core.conditions.pose_keypoints import parse_pose
from lofa_core.documents import read_json, read_lines, shown

from ..config import DataConfig
from . import media

TASKS = "tasks.jsonl"
SPLITS = ("training", "held_out")
CONDITION_FILES = ("pose", "style", "identity")
_KEYS = ("id", "prompt", "coarse_prompt", "split", "clips", *CONDITION_FILES)
_CLIP_KEYS = ("file", "caption")
ID = re.compile(r"\w[\w .-]{0,99}")  # it becomes a file's name


@dataclass(frozen=True)
class Clip:
    """A video or an image, and what it shows in words ("": nothing is said)."""

    file: str  # relative to the dataset's folder, with forward slashes
    caption: str = ""


@dataclass(frozen=True)
class Task:
    """One personalisation with its clips. Prints as its id."""

    id: str
    prompt: str  # "": has none
    coarse_prompt: str
    split: str  # one of SPLITS
    clips: tuple[Clip, ...]
    pose: tuple[str, ...] = ()  # files, of the kinds that data.conditions names
    style: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.id

    def kinds(self, asked: Sequence[str]) -> list[str]:
        """Those of the kinds asked for that it can be described by."""
        return [kind for kind in asked if (self.prompt if kind == "text" else getattr(self, kind))]


@dataclass(frozen=True)
class Problem:
    """Something that was left out: a file, a line or a task, and why, in words that can be shown."""

    what: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "what", shown(self.what))
        object.__setattr__(self, "reason", shown(self.reason))


@dataclass(frozen=True)
class TaskFolder:
    """What can be used of a dataset, and what cannot."""

    path: Path
    tasks: tuple[Task, ...]
    problems: tuple[Problem, ...]


def read_task_folder(folder: Path, config: DataConfig) -> TaskFolder:
    """Read tasks.jsonl and look into every file that it names, those of conditions where they are asked for.

    What is wrong with single lines, tasks and files goes into `problems`. Raises ValueError naming the folder
    where there is no tasks.jsonl, no training task is left, or the tasks differ in their coarse prompt.
    """
    listing = folder / TASKS
    if not listing.is_file():
        raise ValueError(
            f"{folder}: no {TASKS} here. Expected a folder with {TASKS}, a line of JSON for each task: "
            '{"id": "wave", "prompt": "a person waves", "clips": [{"file": "wave.mp4"}]}'
        )
    reader = _Reader(folder, config)
    for number, line in enumerate(read_lines(listing), 1):
        if line.strip():
            reader.read_line(f"{TASKS} line {number}", line)
    tasks, problems = tuple(reader.tasks.values()), tuple(reader.problems)
    if not any(task.split == "training" for task in tasks):
        first = "".join(f" {problem.what}: {problem.reason}." for problem in problems[:3])
        raise ValueError(
            f"{folder}: no training task can be read ({len(tasks)} held-out, {len(problems)} problems)."
            f'{first} Expected lines in {TASKS} such as {{"id": "wave", "prompt": "a person waves", "clips": '
            '[{"file": "wave.mp4"}]}'
        )
    coarse = {task.coarse_prompt: task.id for task in tasks}
    if len(coarse) > 1:
        (one, first), (other, second), *_ = coarse.items()
        raise ValueError(
            f'{listing}: task {first} has the coarse prompt "{one}", {second} has "{other}". All LoRAs of a '
            "dataset are trained under one: make them equal, or leave them out and set data.coarse_prompt."
        )
    return TaskFolder(folder, tasks, problems)


class _Reader:
    def __init__(self, folder: Path, config: DataConfig):
        self.folder, self.config = folder, config
        self.tasks: dict[str, Task] = {}  # by their ids without case, as some file systems see them
        self.problems: list[Problem] = []

    def read_line(self, where: str, line: bytes) -> None:
        try:
            values = json.loads(line)  # also decodes it as UTF-8
        except (ValueError, RecursionError) as error:
            self._skip(where, f"not a line of JSON ({error})")
            return
        if not isinstance(values, dict):
            self._skip(where, f"expected an object with the keys {', '.join(_KEYS)}")
            return
        identity = values.get("id")
        if not isinstance(identity, str) or not ID.fullmatch(identity):
            self._skip(
                where,
                f"id is {identity!r}; expected up to 100 letters, digits, spaces, dots, - and _, starting "
                "with a letter, a digit or _",
            )
            return
        where = f"task {identity} ({where})"
        if identity.casefold() in self.tasks:
            self._skip(where, "another task has this id; the first one counts")
            return
        reason = _wrong_types(values)
        if reason:
            self._skip(where, reason)
            return
        numbered = enumerate(values.get("clips") or [], 1)
        clips = [clip for n, entry in numbered if (clip := self._clip(f"clip {n} of {where}", entry))]
        if not clips:
            self._skip(where, "no clip of it can be used")
            return
        asked = self.config.conditions
        task = Task(
            identity,
            (values.get("prompt") or "").strip(),
            (values.get("coarse_prompt") or self.config.coarse_prompt).strip(),
            values.get("split") or "training",
            tuple(clips),
            **{
                kind: self._conditions(where, kind, _listed(values.get(kind)))
                for kind in CONDITION_FILES
                if kind in asked
            },
        )
        if "pose" in asked and self.config.pose_models and not values.get("pose"):
            task = replace(task, pose=tuple(clip.file for clip in clips))
        if not task.kinds(asked):
            self._skip(where, lacks(asked))
            return
        self.tasks[identity.casefold()] = task

    def _clip(self, where: str, entry: Any) -> Clip | None:
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("file"), str)
            or not isinstance(entry.get("caption") or "", str)
        ):
            self._skip(where, f'is {entry!r}; expected {{"file": "a.mp4"}}, with or without a caption')
            return None
        unknown = [key for key in entry if key not in _CLIP_KEYS]
        if unknown:
            self._skip(where, f"has the unknown key {unknown[0]!r}; known are {', '.join(_CLIP_KEYS)}")
            return None
        path = self.folder / entry["file"]
        reason = why_not(self.folder, entry["file"])
        if reason is None:
            try:
                media.check(path)
            except ValueError as error:
                reason = reason_of(error, path)
        if reason is not None:
            self._skip(f"{entry['file']}, {where}", reason)
            return None
        return Clip(entry["file"], (entry.get("caption") or "").strip())

    def _conditions(self, where: str, kind: str, files: Sequence[str]) -> tuple[str, ...]:
        """Those of a condition's files that can be used."""
        kept = []
        for file in files:
            path = self.folder / file
            reason = why_not(self.folder, file)
            if reason is None:
                try:
                    check_condition(path, kind)
                except ValueError as error:
                    reason = reason_of(error, path)
            if reason is None:
                kept.append(file)
            else:
                self._skip(f"{file}, {kind} of {where}", reason)
        return tuple(kept)

    def _skip(self, what: str, reason: str) -> None:
        self.problems.append(Problem(what, reason))


def why_not(folder: Path, file: str) -> str | None:
    """Why a file that a dataset names must not or cannot be read; None where nothing speaks against it."""
    path = folder / file
    try:
        if PurePosixPath(file).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
            return "leads out of the dataset's folder; put the file itself into it"
        return None if path.is_file() else "no such file"
    except (OSError, ValueError) as error:  # no permission, a name no system can have
        return f"cannot be read ({error})"


def check_condition(path: Path, kind: str) -> None:
    """Look into a file that shows a pose, a style or a person. Raises ValueError where it cannot be used."""
    if kind == "pose" and is_document(path):
        parse_pose(read_json(path))
    elif kind != "pose" and not media.is_image(path):
        raise ValueError(f"is no picture; expected {', '.join(media.IMAGES)} for a {kind}")
    else:
        media.check(path)


def is_document(path: Path) -> bool:
    """Whether a pose is given by its keypoints."""
    return path.suffix.lower() == ".json"


def lacks(asked: Sequence[str]) -> str:
    """Why a task that has none of the kinds asked for is left out."""
    names = ["prompt" if kind == "text" else kind for kind in asked]
    return f"has no {' and no '.join(names)} that can be used; data.conditions asks for {', '.join(asked)}"


def reason_of(error: ValueError, path: Path) -> str:
    """What an error about a file says, without the file's name at its start."""
    return str(error).removeprefix(f"{path}: ")


def _listed(value: Any) -> list:
    """One thing or a list of them, as a list."""
    return value if isinstance(value, list) else [value] if value else []


def _wrong_types(values: dict[str, Any]) -> str | None:
    """What of a task's line is not as expected, its id and single clips apart."""
    unknown = [key for key in values if key not in _KEYS]
    if unknown:
        return f"has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}"
    for key in ("prompt", "coarse_prompt"):
        if not isinstance(values.get(key) or "", str):
            return f"{key} is {values[key]!r}; expected text"
    for key in CONDITION_FILES:
        if not all(isinstance(file, str) for file in _listed(values.get(key))):
            return f"{key} is {values[key]!r}; expected a file or a list of files"
    if (values.get("split") or "training") not in SPLITS:
        return f"split is {values['split']!r}; expected {' or '.join(SPLITS)}"
    if not isinstance(values.get("clips") or [], list):
        return f"clips is {values['clips']!r}; expected a list"
    return None
