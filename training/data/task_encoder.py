"""A task's files as tensors: its clips, texts, poses and pictures, as the cache keeps them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lofa_core.conditions.image import CLIPImageEncoder
from lofa_core.conditions.pose import pose_from_keypoints, resample_frames
from lofa_core.documents import read_json
from lofa_core.safetensors_file import open_safetensors

from ..config import DataConfig
from . import media, published
from .base_encoders import BaseEncoders, WanEncoders
from .pose_video import PoseFinder, open_pose_finder, poses_of_video
from .task_folder import CONDITION_FILES, Task, is_document, lacks, reason_of

Skip = Callable[[str, str], None]  # hears of what is left out, and why


def fingerprint(config: DataConfig, base: Path, encoders: type[BaseEncoders]) -> str:
    """16 hex digits of all that tasks are encoded with: names, sizes, and the first MiB of each file.

    Raises ValueError where a folder of them is missing or has a damaged file.
    """
    whole = "Expected a base folder with " + ", ".join(f"{part}/" for part in encoders.folders)
    parts = dict.fromkeys((base / part for part in encoders.folders), whole)
    if {"style", "identity"} & set(config.conditions):
        parts[_image_encoder(config, base)] = (
            "Set data.image_encoder to a folder with CLIP-ViT-L's vision model as transformers saves it"
        )
    if "pose" in config.conditions and config.pose_models:
        parts[Path(config.pose_models)] = "Set data.pose_models to a folder of pose models, or to none"
    digest = hashlib.sha256()
    for folder, expected in parts.items():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if not files:
            raise ValueError(f"{folder}: is no folder with files in it. {expected}.")
        for file in files:
            if file.suffix == ".safetensors":
                open_safetensors(file)  # a damaged one is better said now than by a library
            digest.update(f"{file.relative_to(folder.parent).as_posix()} {file.stat().st_size};".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(2**20))
    return digest.hexdigest()[:16]


def _image_encoder(config: DataConfig, base: Path) -> Path:
    return Path(config.image_encoder) if config.image_encoder else base / "image_encoder"


class TaskEncoder:
    """Encodes tasks with the base's encoders and those of conditions, each loaded when first needed."""

    def __init__(self, config: DataConfig, base: Path, encoders: BaseEncoders):
        self.config, self.base, self.encoders = config, base, encoders
        self.folder = Path(config.folder)

    def encode(self, task: Task, skip: Skip) -> tuple[dict[str, Tensor], Task]:
        """A task's tensors, and the task with the clips, captions and condition files that are in them.
        `skip` hears of the others; a task without clips is left out. Raises what loading the encoders does.
        """
        # What is wrong with encoders is not the task's problem: they are read before anything is skipped.
        if published.is_published(self.folder):
            return self._converted(task, skip)
        self._load()
        nothing = replace(task, clips=())
        try:
            tensors = self._text("coarse_prompt", task.coarse_prompt)
            if task.prompt:
                tensors |= self._text("prompt", task.prompt)
        except ValueError as error:
            skip(f"task {task}", str(error))
            return {}, nothing
        given, task = self._conditions(task, skip)
        if not task.kinds(self.config.conditions):
            skip(f"task {task}", lacks(self.config.conditions))
            return {}, nothing
        shown, task = self._clips(task, skip)
        if not task.clips:
            skip(f"task {task}", "no clip of it can be used")
        return tensors | given | shown, task

    def _load(self) -> None:
        self.encoders.load()
        asked = self.config.conditions
        if "style" in asked or "identity" in asked:
            _ = self._images
        if "pose" in asked and self.config.pose_models:
            _ = self._find_poses

    @cached_property
    def _images(self) -> CLIPImageEncoder:
        return CLIPImageEncoder.open(_image_encoder(self.config, self.base), self.encoders.device)

    @cached_property
    def _find_poses(self) -> PoseFinder:
        return open_pose_finder(Path(self.config.pose_models), self.encoders.device.type)

    def _text(self, name: str, text: str) -> dict[str, Tensor]:
        """The tensors `name` and, for SDXL, `name`.pooled."""
        found = self.encoders.text(text)
        return {name if part == "states" else f"{name}.{part}": value for part, value in found.items()}

    def _clips(self, task: Task, skip: Skip) -> tuple[dict[str, Tensor], Task]:
        config, clips = self.config, []
        latents: list[Tensor] = []
        tensors: dict[str, Tensor] = {}
        for clip in task.clips:
            path = self.folder / clip.file
            try:
                shown = media.read_clip(path, config.frames, config.height, config.width, config.fps)
                latents.append(self.encoders.latents(shown))
            except ValueError as error:
                skip(f"{clip.file} of task {task}", reason_of(error, path))
                continue
            if clip.caption and "text" in config.conditions:
                try:
                    tensors |= self._text(f"captions.{len(clips)}", clip.caption)
                except ValueError as error:
                    skip(f"caption of {clip.file} of task {task}", str(error))
                    clip = replace(clip, caption="")
            clips.append(clip)
        if latents:
            tensors["latents"] = torch.cat(latents)
        return tensors, replace(task, clips=tuple(clips))

    def _conditions(self, task: Task, skip: Skip) -> tuple[dict[str, Tensor], Task]:
        """Poses uint8 [n, 3, T, H, W], states of pictures float16 [n, S, d]."""
        tensors: dict[str, Tensor] = {}
        for kind in CONDITION_FILES:
            read = self._pose if kind == "pose" else self._picture
            rows, kept = [], []
            for file in getattr(task, kind):
                try:
                    rows.append(read(self.folder / file))
                    kept.append(file)
                except ValueError as error:
                    skip(f"{file}, {kind} of task {task}", reason_of(error, self.folder / file))
            if rows:
                tensors[kind] = torch.stack(rows)
            task = replace(task, **{kind: tuple(kept)})
        return tensors, task

    def _pose(self, path: Path) -> Tensor:
        """Drawn skeletons uint8 [3, T, H, W] of keypoints, of a clip or a video of skeletons."""
        config = self.config
        size = config.pose_frames, config.pose_size, config.pose_size
        if is_document(path):
            drawn = pose_from_keypoints(read_json(path), *size)
        elif config.pose_models:
            clip = media.read_clip(path, config.frames, config.height, config.width, config.fps)
            looked_at = np.unique(np.linspace(0, len(clip) - 1, config.pose_frames).round().astype(int))
            drawn = pose_from_keypoints(poses_of_video(clip[looked_at], self._find_poses), *size)
        else:
            drawn = resample_frames(media.read_whole(path, config.pose_frames), *size)
        if not drawn.any():
            raise ValueError(f"{path}: shows nobody in any of its frames.")
        return (255.0 * drawn[0]).round().byte()

    def _picture(self, path: Path) -> Tensor:
        return self._images.encode(media.read_whole(path, 1))[0].half().cpu()

    def _converted(self, task: Task, skip: Skip) -> tuple[dict[str, Tensor], Task]:
        """The same from the published layout, which holds latents and states; the coarse prompt is ours."""
        if not isinstance(self.encoders, WanEncoders):
            raise ValueError(
                f"{self.folder}: {published.METADATA} lists latents of WAN2.1; the base is another."
            )
        self.encoders.load()
        file = self.folder / task.clips[0].file
        try:
            prompt, latents = published.read_tensors(file)
            coarse = self._text("coarse_prompt", task.coarse_prompt)
            width = coarse["coarse_prompt"].shape[1]
            if prompt.shape[1] != width:
                raise ValueError(
                    f"prompt_emb has {prompt.shape[1]} numbers a token, this base's text encoder {width}."
                )
            self._check_latents(latents.shape[1:])
        except ValueError as error:
            skip(f"{task.clips[0].file} of task {task}", reason_of(error, file))
            return {}, replace(task, clips=())
        tensors = coarse | {"prompt": prompt, "latents": latents.half()}
        return tensors, replace(task, clips=task.clips * len(latents))

    def _check_latents(self, found: Sequence[int]) -> None:
        config = self.config
        wanted = (16, 1 + (config.frames - 1) // 4, config.height // 8, config.width // 8)  # WAN2.1's VAE
        if tuple(found) != wanted:
            raise ValueError(
                f"latents are {list(found)}; {config.frames} frames of {config.height} x {config.width} have "
                f"{list(wanted)}. Set data.frames, data.height and data.width to theirs."
            )
