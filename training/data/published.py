"""The published layout: the folder that LoFA's authors train from, as far as its description says.

We have not seen such a folder. What is known: metadata.json lists the samples; each has its LoRA as a state
dict in a .pth file, and a .pth file with the tensors `prompt_emb` and `latents`. What is assumed beyond that
stands in the tables below and is checked; whatever is otherwise is an error that says what was found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lofa_core.archives import load_archive
from lofa_core.base_models import TargetLayer
from lofa_core.documents import MAX_LINES, read_json
from lofa_core.lora import LoRA
from lofa_core.lora_files import from_state_dict
from lofa_core.numbers import check_finite

from ..config import DataConfig
from ..lora_dataset import LoRAFolder, Record
from .task_folder import ID, TASKS, Clip, Problem, Task, TaskFolder, reason_of, why_not

METADATA = "metadata.json"
# What an entry of metadata.json holds -> the keys it may stand under; the first that is there counts.
ENTRY_KEYS = {
    "prompt": ("prompt", "text", "caption"),
    "lora": ("lora", "lora_path", "lora_file"),
    "tensors": ("tensors", "tensors_path", "latents_path", "latents", "data_path", "path", "file"),
}
LISTS = ("samples", "data", "items", "entries")  # where metadata.json is an object with the list under a key
CONTEXT = "context"  # where prompt_emb is itself a dict of the text encoder's results


@dataclass(frozen=True)
class Sample:
    """One task: files relative to the dataset's folder. Prints as its id."""

    id: str
    prompt: str
    lora: str
    tensors: str

    def __str__(self) -> str:
        return self.id


def read_published(folder: Path) -> tuple[tuple[Sample, ...], tuple[Problem, ...]]:
    """The samples of metadata.json whose files are there, and what was left out.

    Raises ValueError naming the file where it is no list of samples or none of them can be used.
    """
    listing = folder / METADATA
    try:
        values = read_json(listing)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no {METADATA} here.") from error
    samples: dict[str, Sample] = {}
    problems: list[Problem] = []
    for name, entry in _entries(listing, values):
        try:
            sample = _sample(folder, name, entry)
            if sample.id.casefold() in samples:
                raise ValueError("another entry has this id; the first one counts")
        except ValueError as error:
            problems.append(Problem(f"{METADATA} entry {name}", str(error)))
        else:
            samples[sample.id.casefold()] = sample
    if not samples:
        first = f" {problems[0].what}: {problems[0].reason}." if problems else ""
        raise ValueError(f"{listing}: none of its {len(problems)} entries can be used.{first}")
    return tuple(samples.values()), tuple(problems)


def is_published(folder: Path) -> bool:
    """Whether a folder has this layout and not tasks.jsonl."""
    return (folder / METADATA).is_file() and not (folder / TASKS).is_file()


def published_tasks(folder: Path, config: DataConfig) -> TaskFolder:
    """The samples as tasks, all for training, whose one clip is the file of tensors.

    Raises ValueError as `read_published`, and where other conditions than text are asked for.
    """
    if config.conditions != ("text",):
        raise ValueError(
            f"{folder}: this layout holds prompts, no files of other conditions; data.conditions asks for "
            f'{", ".join(config.conditions)}. Set it to ["text"].'
        )
    samples, problems = read_published(folder)
    tasks = (
        Task(sample.id, sample.prompt.strip(), config.coarse_prompt, "training", (Clip(sample.tensors),))
        for sample in samples
    )
    return TaskFolder(folder, tuple(tasks), problems)


def import_loras(
    folder: Path, layers: Sequence[TargetLayer], rank: int, into: LoRAFolder
) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
    """Write the samples' LoRAs into a LoRA dataset that lacks them: (their ids, what was left out and why).

    A LoRA has to change all `layers` in their shapes, with this rank. Raises ValueError as `read_published`.
    """
    into.prepare()
    there, done, problems = into.valid(), [], []
    for sample in read_published(folder)[0]:
        if sample.id in there:
            continue
        path = folder / sample.lora
        try:
            A, B = _factors(path, layers, rank)
        except ValueError as error:
            problems.append(Problem(f"{sample.lora} of task {sample}", reason_of(error, path)))
            continue
        names = [layer.name for layer in layers]
        file, sha256 = into.write({"task": sample.id}, names, A, B)
        into.append([Record(sample.id, "done", file, sha256, settings={"from": sample.lora})])
        done.append(sample.id)
    return tuple(done), tuple(problems)


def _factors(path: Path, layers: Sequence[TargetLayer], rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """A [r, in] and B [out, r] float32 of each layer, alpha folded into B."""
    lora = read_lora(path)
    unknown = set(lora) - {layer.name for layer in layers}
    if unknown:
        raise ValueError(f"{path}: changes {min(unknown)}, which this base does not have.")
    for layer in layers:
        found = lora.get(layer.name)
        if found is None or (found.shape, found.rank) != (layer.shape, rank):
            said = "nothing" if found is None else f"{found.shape} of rank {found.rank}"
            raise ValueError(f"{path}: {layer.name} has {said}; expected {layer.shape} of rank {rank}.")
    A = [lora[layer.name].A.float() for layer in layers]
    return A, [lora[layer.name].B.float() * (lora[layer.name].alpha / rank) for layer in layers]


def _entries(listing: Path, values: Any) -> list[tuple[str, Any]]:
    """(id, entry) of a list, whose entries may name their id, or of an object by id."""
    if isinstance(values, dict):
        for key in LISTS:
            if isinstance(values.get(key), list):
                values = values[key]
                break
    if isinstance(values, dict | list) and len(values) > MAX_LINES:
        raise ValueError(f"{listing}: has {len(values)} entries, at most {MAX_LINES} are read.")
    if isinstance(values, dict):
        return list(values.items())
    if isinstance(values, list):
        named = [entry.get("id") if isinstance(entry, dict) else None for entry in values]
        return [
            (f"{index:06}" if name is None else str(name), entry)
            for index, (name, entry) in enumerate(zip(named, values, strict=True))
        ]
    raise ValueError(f"{listing}: holds a {type(values).__name__}; expected a list or an object of samples.")


def _sample(folder: Path, name: str, entry: Any) -> Sample:
    if not ID.fullmatch(name):
        raise ValueError(f"its id {name!r} cannot be a file's name")
    if not isinstance(entry, dict):
        raise ValueError(f"is a {type(entry).__name__}; expected an object")
    found = {}
    for part, keys in ENTRY_KEYS.items():
        key = next((key for key in keys if key in entry), None)
        if key is None:
            raise ValueError(
                f"has the keys {', '.join(entry)}; expected {part} under one of {', '.join(keys)}"
            )
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise ValueError(f"{key} is {entry[key]!r}; expected text")
        found[part] = entry[key]
    for part in ("lora", "tensors"):
        if reason := why_not(folder, found[part]):
            raise ValueError(f"{found[part]}: {reason}")
    return Sample(name, **found)


def read_tensors(path: Path) -> tuple[Tensor, Tensor]:
    """(text states [S, d] without padding, unit latents [N, C, T, H, W]) of a sample.

    `prompt_emb` may be [S, d] or [1, S, d], padded with rows of zeros, or a dict with that under `context`;
    `latents` [C, T, H, W] or [N, C, T, H, W], taken to be normalised. Raises ValueError naming the file.
    """
    values = _load(path)
    for key in ("prompt_emb", "latents"):
        if key not in values:
            raise ValueError(
                f"{path}: has the keys {', '.join(map(str, values))}; expected prompt_emb, latents."
            )
    states = values["prompt_emb"]
    if isinstance(states, Mapping):
        if CONTEXT not in states:
            raise ValueError(
                f"{path}: prompt_emb is a dict of {', '.join(map(str, states))}; expected {CONTEXT}."
            )
        states = states[CONTEXT]
    states = _checked(path, "prompt_emb", states, (2, 3), "[S, d] or [1, S, d]")
    if states.ndim == 3:
        if len(states) != 1:
            raise ValueError(f"{path}: prompt_emb is {list(states.shape)}; expected [S, d] or [1, S, d].")
        states = states[0]
    said = states.abs().sum(-1).nonzero()
    if not len(said):
        raise ValueError(f"{path}: prompt_emb is zero everywhere.")
    latents = _checked(path, "latents", values["latents"], (4, 5), "[C, T, H, W] or [N, C, T, H, W]")
    return states[: int(said[-1]) + 1], latents if latents.ndim == 5 else latents[None]


def read_lora(path: Path) -> LoRA:
    """A sample's LoRA, in any layout that lofa_core reads. Raises ValueError naming the file and the key."""
    values = _load(path)
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {key!r} holds a {type(value).__name__}; expected a state dict of tensors."
            )
        check_finite(value, f"{path}: {key}")
    try:
        return from_state_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path: Path) -> dict:
    """A dict out of a .pth file; of tensors and plain values; no code is run."""
    values = load_archive(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; expected a dict.")
    return values


def _checked(path: Path, key: str, value: Any, dimensions: tuple[int, ...], expected: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: {key} is a {type(value).__name__}; expected a tensor {expected}.")
    if value.ndim not in dimensions or not value.numel() or not value.is_floating_point():
        raise ValueError(f"{path}: {key} is {value.dtype} {list(value.shape)}; expected {expected}.")
    if not value.isfinite().all():
        raise ValueError(f"{path}: {key} has values that are not finite.")
    return value
