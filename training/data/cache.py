"""The `cache` step: every clip as unit latents and every text as states, computed once, a file to a task.

<run>/cache/<task id>.safetensors holds `latents` float16 [N, C, T, H, W] of N clips, and text states [S, d]
as the encoder gives them: `prompt`, `coarse_prompt`, and `captions.<i>` where clip i has a caption.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKLWan
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lofa_core.base_models import open_safetensors
from lofa_core.conditions.text import TextEncoder
from lofa_core.lora_files import write_safetensors

from ..backbones import TEXT_LENGTH, load_vae, to_unit
from ..config import DataConfig
from . import media, published
from .task_folder import Clip, Problem, Task, read_task_folder, reason_of

INDEX = "tasks.json"  # which tasks the cache holds, and of what; written last
REPORT = "data_report.json"
_FORMAT = 1  # changes where what is written changes
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
    found = read(source, config.coarse_prompt)
    folder = run / "cache"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # until all of its files are those it speaks of
        for unfinished in folder.glob(".*.safetensors.*"):
            unfinished.unlink()
    accelerator.wait_for_everyone()
    fingerprint = encoders_fingerprint(base)
    encoder = _Encoder(config, base, accelerator.device)
    mine = found.tasks[accelerator.process_index :: accelerator.num_processes]
    shown = track(mine, "cache", console=console, disable=not accelerator.is_main_process)
    outcomes = gather_object(
        [_cached(task, folder, encoder, key_of(task, config, fingerprint)) for task in shown]
    )
    place = {task.id: number for number, task in enumerate(found.tasks)}
    outcomes.sort(key=lambda outcome: place[outcome.task.id])
    kept = {outcome.task.id: outcome for outcome in outcomes if outcome.task.clips}
    summary = CacheSummary(
        config.folder,
        tuple(name for name, outcome in kept.items() if outcome.task.split == "training"),
        tuple(name for name, outcome in kept.items() if outcome.task.split == "held_out"),
        sum(len(outcome.task.clips) for outcome in kept.values()),
        tuple(name for name, outcome in kept.items() if outcome.new),
        tuple(name for name, outcome in kept.items() if not outcome.new),
        (*found.problems, *(problem for outcome in outcomes for problem in outcome.problems)),
    )
    if accelerator.is_main_process:
        for file in folder.glob("*.safetensors"):
            if file.stem not in kept:
                file.unlink()
        _write(folder / INDEX, {"tasks": list(kept)} | settings_of(config, fingerprint))
        _write(run / REPORT, summary.report())
        console.print(str(summary), soft_wrap=True, markup=False)
    accelerator.wait_for_everyone()
    if not summary.training:
        raise ValueError(f"{found.path}: no training task could be encoded; {run / REPORT} says why.")
    return summary


def settings_of(config: DataConfig, fingerprint: str) -> dict:
    """What a whole cache was made with."""
    names = ("folder", "frames", "height", "width", "fps", "coarse_prompt")
    return {name: getattr(config, name) for name in names} | {"encoders": fingerprint, "format": _FORMAT}


def encoders_fingerprint(base: Path) -> str:
    """16 hex digits of a base folder's VAE, text encoder and tokenizer: names, sizes, and the first MiB of
    each file. Raises ValueError where one of the three folders is missing or has a damaged file.
    """
    digest = hashlib.sha256()
    for part in ("vae", "text_encoder", "tokenizer"):
        files = sorted(file for file in (base / part).rglob("*") if file.is_file())
        if not files:
            raise ValueError(
                f"{base}: no {part} folder with files in it. Expected a base folder with transformer/, vae/, "
                "text_encoder/ and tokenizer/."
            )
        for file in files:
            if file.suffix == ".safetensors":
                open_safetensors(file)  # a damaged one is better said now than by a library
            digest.update(f"{file.relative_to(base).as_posix()} {file.stat().st_size};".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(2**20))
    return digest.hexdigest()[:16]


def key_of(task: Task, config: DataConfig, fingerprint: str) -> str:
    """A hash of all that a task's cached file depends on; its clips by name, size and time of change."""
    files = [(Path(config.folder) / clip.file).stat() for clip in task.clips]
    content = {
        "format": _FORMAT,
        "encoders": fingerprint,
        "task": asdict(task),
        "files": [(file.st_size, file.st_mtime_ns) for file in files],
        "clips": [config.frames, config.height, config.width, config.fps],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_cached(path: Path) -> tuple[str, Task, tuple[Problem, ...]] | None:
    """(key, the task with the clips that are in the file, what was left out); None where there is no whole
    file.
    """
    try:
        with open_safetensors(path) as file:
            metadata = file.metadata()
    except (FileNotFoundError, ValueError):
        return None
    values = json.loads(metadata["task"])
    clips = tuple(Clip(**clip) for clip in values.pop("clips"))
    problems = tuple(Problem(**problem) for problem in json.loads(metadata["problems"]))
    return metadata["key"], Task(clips=clips, **values), problems


@dataclass(frozen=True)
class _Outcome:
    task: Task  # with the clips that were encoded; none: the task is left out
    new: bool
    problems: tuple[Problem, ...]


def _cached(task: Task, folder: Path, encoder: "_Encoder", key: str) -> _Outcome:
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


class _Encoder:
    """The base folder's VAE and text encoder, each loaded when it is first needed."""

    def __init__(self, config: DataConfig, base: Path, device: torch.device):
        self.config, self.base, self.device = config, base, device

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        return load_vae(self.base).to(self.device)

    @cached_property
    def text(self) -> TextEncoder:
        return TextEncoder.open(self.base, self.device)

    def encode(self, task: Task, skip: Callable[[str, str], None]) -> tuple[dict[str, Tensor], Task]:
        """A task's tensors, and the task with the clips and captions that are in them; `skip` hears of the
        others. Raises what loading the encoders does.
        """
        if published.is_published(Path(self.config.folder)):
            return self._converted(self.text, task, skip)
        text, vae = self.text, self.vae  # what is wrong with them is not the task's problem
        try:
            tensors = {name: _states(text, getattr(task, name)) for name in ("prompt", "coarse_prompt")}
        except ValueError as error:
            skip(f"task {task}", str(error))
            return {}, replace(task, clips=())
        clips: list[Clip] = []
        latents: list[Tensor] = []
        for clip in task.clips:
            try:
                latents.append(self._latents(vae, clip))
            except ValueError as error:
                path = Path(self.config.folder) / clip.file
                skip(f"{clip.file} of task {task}", reason_of(error, path))
                continue
            if clip.caption:
                try:
                    tensors[f"captions.{len(clips)}"] = _states(text, clip.caption)
                except ValueError as error:
                    skip(f"caption of {clip.file} of task {task}", str(error))
                    clip = replace(clip, caption="")
            clips.append(clip)
        if not clips:
            skip(f"task {task}", "no clip of it can be used")
            return {}, replace(task, clips=())
        return tensors | {"latents": torch.cat(latents)}, replace(task, clips=tuple(clips))

    def _converted(
        self, text: TextEncoder, task: Task, skip: Callable[[str, str], None]
    ) -> tuple[dict[str, Tensor], Task]:
        """The same from the published layout, which holds latents and states; the coarse prompt is ours."""
        file = Path(self.config.folder) / task.clips[0].file
        try:
            prompt, latents = published.read_tensors(file)
            coarse = _states(text, task.coarse_prompt)
            if prompt.shape[1] != coarse.shape[1]:
                raise ValueError(
                    f"prompt_emb has {prompt.shape[1]} numbers a token, this base's text encoder "
                    f"{coarse.shape[1]}."
                )
            self._check_latents(latents)
        except ValueError as error:
            skip(f"{task.clips[0].file} of task {task}", reason_of(error, file))
            return {}, replace(task, clips=())
        tensors = {"prompt": prompt, "coarse_prompt": coarse, "latents": latents.half()}
        return tensors, replace(task, clips=task.clips * len(latents))

    def _check_latents(self, latents: Tensor) -> None:
        config = self.config
        wanted = (16, 1 + (config.frames - 1) // 4, config.height // 8, config.width // 8)  # WAN2.1's VAE
        if tuple(latents.shape[1:]) != wanted:
            raise ValueError(
                f"latents are {list(latents.shape[1:])}; {config.frames} frames of {config.height} x "
                f"{config.width} have {list(wanted)}. Set data.frames, data.height and data.width to theirs."
            )

    @torch.no_grad()
    def _latents(self, vae: AutoencoderKLWan, clip: Clip) -> Tensor:
        """Unit latents float16 [1, C, T, H, W], the posterior's mean."""
        config = self.config
        shown = media.read_clip(
            Path(config.folder) / clip.file, config.frames, config.height, config.width, config.fps
        )
        video = torch.from_numpy(shown).to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        return to_unit(vae.encode(video).latent_dist.mean, vae).half().cpu()


def _states(encoder: TextEncoder, text: str) -> Tensor:
    """Text states [S, d] without padding. Raises ValueError for a text that is too long."""
    states = encoder.encode(text)[0].cpu()
    if len(states) >= TEXT_LENGTH:
        raise ValueError(f"the text has {len(states)} tokens, {TEXT_LENGTH - 1} are read. Shorten it.")
    return states


def _write(path: Path, values: dict) -> None:
    """Write JSON whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
