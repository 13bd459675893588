"""The videos and pictures of a folder, read through OpenCV, their pairing with references, and prompts."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Clip:
    """A video, or a picture as a video of one frame."""

    path: Path
    name: str  # its path in the folder, without the suffix: "alice/03"
    count: int  # of frames that can be decoded
    fps: float  # 0 for a picture

    @property
    def group(self) -> str:
        """The folder that the file lies in, "" for the folder named: files of one subject share it."""
        return self.name.rpartition("/")[0]

    def frames(self, step: int = 1) -> Iterator[np.ndarray]:
        """Every `step`-th frame from the first on: uint8 [H, W, 3] (RGB)."""
        return self._picked(range(0, self.count, step))

    def evenly(self, most: int) -> np.ndarray:
        """`most` frames evenly from the first to the last, or all of fewer: uint8 [T, H, W, 3]."""
        picks = np.linspace(0, self.count - 1, min(most, self.count)).round().astype(int)
        return np.stack(list(self._picked(picks.tolist())))

    def _picked(self, picks: Sequence[int]) -> Iterator[np.ndarray]:
        if is_picture(self.path):
            yield _read_picture(self.path)
            return
        cv2, wanted = opencv(), set(picks)
        capture = cv2.VideoCapture(str(self.path))
        try:
            for index in range(picks[-1] + 1):
                if not capture.grab():
                    raise ValueError(f"{self.path}: frame {index} of {self.count} cannot be decoded again.")
                if index in wanted:
                    yield cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
        finally:
            capture.release()


def opencv() -> ModuleType:
    """OpenCV. ValueError where it is missing."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError("Reading videos needs OpenCV: pip install opencv-python-headless") from error
    return cv2


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def read_folder(folder: Path) -> tuple[list[Clip], dict[str, str]]:
    """The videos and pictures in a folder and below it, in the order of their names, and why others of these
    suffixes could not be read (name -> reason). Files of other suffixes are none of ours.

    ValueError where it is no folder, holds none, none can be read, or two differ in their suffix alone.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Name a folder of videos or pictures.")
    files = sorted(
        (path.relative_to(folder).with_suffix("").as_posix(), path)
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEOS + PICTURES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise ValueError(f"{folder}: holds no video and no picture ({', '.join(VIDEOS + PICTURES)}).")
    clips: list[Clip] = []
    unreadable: dict[str, str] = {}
    for i, (name, path) in enumerate(files):
        if i and files[i - 1][0] == name:
            raise ValueError(f"{path} and {files[i - 1][1].name}: the same name twice. Rename one of them.")
        try:
            clips.append(_opened(name, path))
        except ValueError as error:
            unreadable[name] = str(error)
    if not clips:
        raise ValueError(
            f"{folder}: none of its {len(files)} files can be read; the first: {files[0][1].name}."
        )
    return clips, unreadable


def _opened(name: str, path: Path) -> Clip:
    """Decoded once to count the frames: containers' own counts are often missing or wrong."""
    if is_picture(path):
        _read_picture(path)
        return Clip(path, name, 1, 0.0)
    cv2 = opencv()
    capture = cv2.VideoCapture(str(path))
    try:
        count = 0
        while capture.grab():
            count += 1
        fps = capture.get(cv2.CAP_PROP_FPS)
    finally:
        capture.release()
    if not count:
        raise ValueError(f"{path.name}: no frame of this video can be decoded.")
    return Clip(path, name, count, float(fps))


def _read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] (RGB), turned as its EXIF says."""
    cv2 = opencv()
    data = np.frombuffer(path.read_bytes(), np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if picture is None:
        raise ValueError(f"{path.name}: cannot be decoded as a picture.")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def references_of(clips: Sequence[Clip], references: Sequence[Clip]) -> dict[str, list[Clip]]:
    """The references of each clip, by its name; a clip that has none is not in it.

    Those are the one of the same name; else, for a clip in a subfolder, those in the subfolder of that name
    or the one file of that name; else, where there is but one reference at all, that one.
    """
    found: dict[str, list[Clip]] = {}
    for clip in clips:
        same = [reference for reference in references if reference.name == clip.name]
        if not same and clip.group:
            same = [reference for reference in references if clip.group in (reference.group, reference.name)]
        if not same and len(references) == 1:
            same = list(references)
        if same:
            found[clip.name] = same
    return found


def read_prompts(path: Path, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The prompt of each video, and what the file names that is no video of ours (JSONL alone).

    `names`: of all videos, readable or not, in order. A .jsonl file has a line {"video": "alice/03.mp4",
    "prompt": TEXT} each; any other has a prompt a line, the first for the first video. ValueError for a line
    that is neither, a video named twice, or a count of lines that is not the count of videos.
    """
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if path.suffix.lower() == ".jsonl":
        return _named_prompts(path, lines, names)
    if len(lines) != len(names):
        raise ValueError(
            f"{path}: {len(lines)} lines for {len(names)} videos. Give one prompt a line, in the order of "
            'the videos\' names, or a .jsonl file with {"video": NAME, "prompt": TEXT} a line.'
        )
    for name, other in zip(names, sorted(names, key=_natural), strict=True):
        if name != other:
            raise ValueError(
                f"{path}: the order of the videos is not clear: is {name} or {other} first? Number them with "
                'leading zeros, or give a .jsonl file with {"video": NAME, "prompt": TEXT} a line.'
            )
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"{path}: line {number} is empty; expected a prompt.")
    return {name: line.strip() for name, line in zip(names, lines, strict=True)}, []


def _named_prompts(
    path: Path, lines: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    prompts: dict[str, str] = {}
    unknown: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error}).") from error
        entry = entry if isinstance(entry, Mapping) else {}
        video, prompt = entry.get("video"), entry.get("prompt")
        if not isinstance(video, str) or not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{path}: line {number} must be {{"video": NAME, "prompt": TEXT}}.')
        has_suffix = Path(video).suffix.lower() in VIDEOS + PICTURES
        name = Path(video).with_suffix("").as_posix() if has_suffix else video
        if name in prompts:
            raise ValueError(f"{path}: line {number} names {video} a second time.")
        if name in names:
            prompts[name] = prompt.strip()
        else:
            unknown.append(video)
    return prompts, unknown


def _natural(name: str) -> list[tuple[int, str]]:
    """The order that people mean: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
