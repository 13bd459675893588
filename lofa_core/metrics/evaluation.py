"""The metrics as a table, and running those whose weights and packages are there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from . import faces, fvd, motion
from .clips import Clip
from .distances import cosine, mean_pairwise
from .embedders import CLIP, open_dino
from .raft import RAFTFlow
from .style import open_csd
from .weights import Weights


@dataclass(frozen=True)
class Material:
    """What is measured, and with what."""

    videos: Sequence[Clip]
    all_references: Sequence[Clip]  # empty where the user named none
    references: Mapping[str, Sequence[Clip]]  # by video; see `clips.references_of`
    prompts: Mapping[str, str] | None  # by video; None where the user named none
    weights: Weights
    frames: int  # looked at per video by the metrics of single frames


@dataclass(frozen=True)
class Result:
    """A metric's value, or why it was left out, and which videos did not count in it."""

    name: str
    value: float | None = None
    by_video: Mapping[str, float] = field(default_factory=dict)  # or by group
    skipped: Mapping[str, str] = field(default_factory=dict)  # video -> reason
    left_out: str | None = None


@dataclass(frozen=True)
class Metric:
    """`measure` gives a Result, or raises ValueError where nothing can be measured."""

    name: str
    title: str
    better: str  # "higher" or "lower"
    about: str
    measure: Callable[["Metric", Material], Result]
    weights: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # "reference", "prompts"
    package: tuple[str, str] | None = None  # imported as, installed as

    def result(self, values: Iterable[tuple[str, Callable[[], float]]]) -> Result:
        """The mean over what can be measured; what raises ValueError is skipped by name."""
        found: dict[str, float] = {}
        skipped: dict[str, str] = {}
        for name, value in values:
            try:
                found[name] = float(value())
            except ValueError as error:
                skipped[name] = str(error)
        if not found:
            reason = next(iter(skipped.values()), "there is nothing to measure")
            raise ValueError(f"none of {len(skipped)} could be measured; the first: {reason}")
        return Result(self.name, float(np.mean(list(found.values()))), found, skipped)


def _clip_text(metric: Metric, material: Material) -> Result:
    """Cosine of the prompt and each frame, averaged over the frames, then the videos."""
    clip = material.weights.opened(("clip",), CLIP.open)
    prompts = material.prompts or {}

    def score(video: Clip) -> float:
        if video.name not in prompts:
            raise ValueError("has no prompt.")
        frames = clip.frames(video.evenly(material.frames))
        return cosine(frames, clip.sentences([prompts[video.name]])).mean()

    return metric.result((video.name, partial(score, video)) for video in material.videos)


def _frame_similarity(open_: Callable[..., Any], metric: Metric, material: Material) -> Result:
    """Cosine of the frames of a video and of its references, averaged over frames, references, videos: with a
    picture all frames, with a video the frames of the same place (first to first, last to last)."""
    embedder = material.weights.opened(metric.weights, open_)
    kept: dict[tuple[str, int], np.ndarray] = {}

    def embedded(side: str, clip: Clip, frames: int) -> np.ndarray:
        key = f"{side}/{clip.name}", frames
        if key not in kept:
            kept[key] = embedder.frames(clip.evenly(frames))
        return kept[key]

    def score(video: Clip) -> float:
        similarities = []
        for reference in material.references.get(video.name, ()):
            count = min(material.frames, video.count)
            others = min(count, reference.count)
            count = others if others > 1 else count
            cosines = cosine(embedded("video", video, count), embedded("reference", reference, others))
            similarities += cosines[np.isfinite(cosines)].tolist()  # a face may not be seen in some frames
        if not material.references.get(video.name):
            raise ValueError("has no reference of its name.")
        if not similarities:
            raise ValueError("no frame has a face where its reference has one.")
        return float(np.mean(similarities))

    return metric.result((video.name, partial(score, video)) for video in material.videos)


def _fvd(open_: Callable[..., fvd.VideoFeatures], metric: Metric, material: Material) -> Result:
    """Generated against all references, paired or not."""
    skipped: dict[str, str] = {}

    def long_enough(clips: Sequence[Clip]) -> list[Clip]:
        short = [clip for clip in clips if clip.count < fvd.FRAMES]
        skipped.update({clip.name: f"has {clip.count} frames, FVD needs {fvd.FRAMES}." for clip in short})
        return [clip for clip in clips if clip.count >= fvd.FRAMES]

    generated, real = long_enough(material.videos), long_enough(material.all_references)
    if min(len(generated), len(real)) < 2:
        raise ValueError(
            f"{len(generated)} videos and {len(real)} references of {fvd.FRAMES} frames or more; 2 of each "
            "are the least, hundreds make it meaningful."
        )
    features = material.weights.opened(metric.weights, open_)
    return Result(metric.name, fvd.distance(features, generated, real), {}, skipped)


def _face_diversity(metric: Metric, material: Material) -> Result:
    """Mean LPIPS between the faces of each group (a subfolder of the videos), averaged over the groups. Of a
    video, the first face seen counts."""
    finder = material.weights.opened(("yunet",), faces.FaceFinder.open)
    lpips = material.weights.opened(("alexnet", "lpips"), faces.LPIPS.open)
    groups: dict[str, list[Clip]] = {}
    for video in material.videos:
        groups.setdefault(video.group, []).append(video)
    faceless: dict[str, str] = {}

    def spread(videos: Sequence[Clip]) -> float:
        found = []
        for video in videos:
            crops = (finder.crop(frame) for frame in video.evenly(material.frames))
            face = next((crop for crop in crops if crop is not None), None)
            if face is None:
                faceless[video.name] = "no face is found in it."
            else:
                found.append(face)
        if len(found) < 2:
            raise ValueError(f"{len(found)} faces in this folder; 2 are the least.")
        return mean_pairwise(found, lpips.between)

    result = metric.result((group or ".", partial(spread, videos)) for group, videos in groups.items())
    return Result(result.name, result.value, result.by_video, {**result.skipped, **faceless})


def _dynamic_degree(flow: Callable[[Material], motion.Flow], metric: Metric, material: Material) -> Result:
    opened = flow(material)
    return metric.result((video.name, partial(motion.moves, video, opened)) for video in material.videos)


def _raft(material: Material) -> motion.Flow:
    return material.weights.opened(("raft",), RAFTFlow.open)


def _dis(material: Material) -> motion.Flow:
    return motion.DISFlow()


def _amt_smoothness(metric: Metric, material: Material) -> Result:
    model = material.weights.opened(("amt",), motion.VBenchSmoothness.open)
    return metric.result((video.name, partial(model, video)) for video in material.videos)


def _dis_smoothness(metric: Metric, material: Material) -> Result:
    flow = motion.DISFlow()
    return metric.result(
        (video.name, lambda video=video: motion.smoothness(video.frames(), flow.between))  # type: ignore[misc]
        for video in material.videos
    )


_CD_FVD = ("cdfvd", "cd-fvd")

METRICS = (
    Metric("fvd", "FVD", "lower", "I3D's features, all references", partial(_fvd, fvd.open_i3d),
           ("i3d",), ("reference",), _CD_FVD),
    Metric("fvd_videomae", "FVD (VideoMAE)", "lower", "VideoMAE's features, all references",
           partial(_fvd, fvd.open_videomae), ("videomae",), ("reference",), _CD_FVD),
    Metric("clip_t", "CLIP-T", "higher", "cosine of the prompt's first 77 tokens and the frames", _clip_text,
           ("clip",), ("prompts",)),
    Metric("clip_i", "CLIP-I", "higher", "CLIP's cosine of frames and reference",
           partial(_frame_similarity, CLIP.open), ("clip",), ("reference",)),
    Metric("dino", "DINO", "higher", "DINO's cosine of frames and reference",
           partial(_frame_similarity, open_dino), ("dino",), ("reference",)),
    Metric("csd", "CSD", "higher", "CSD's cosine of frames and reference: style",
           partial(_frame_similarity, open_csd), ("csd",), ("reference",)),
    Metric("face_similarity", "Face similarity", "higher", "SFace's cosine of faces and the reference's",
           partial(_frame_similarity, faces.FaceEmbedder.open), ("yunet", "sface"), ("reference",)),
    Metric("face_diversity", "Face diversity", "higher", "LPIPS between the faces of a folder",
           _face_diversity, ("yunet", "alexnet", "lpips")),
    Metric("dynamic_degree", "Dynamic Degree", "higher", "share of videos that move, VBench's RAFT",
           partial(_dynamic_degree, _raft), ("raft",)),
    Metric("dynamic_degree_dis", "Dynamic Degree, DIS flow", "higher", "ours: VBench's rule on OpenCV's flow",
           partial(_dynamic_degree, _dis)),
    Metric("motion_smoothness", "Motion Smoothness", "higher", "VBench's, with AMT-S", _amt_smoothness,
           ("amt",), (), ("vbench", "vbench")),
    Metric("motion_smoothness_dis", "Motion Smoothness, DIS flow", "higher",
           "ours: VBench's formula on OpenCV's flow", _dis_smoothness),
)  # fmt: skip


def evaluate(material: Material, metrics: Sequence[Metric] = METRICS) -> Iterable[Result]:
    """One result after the other, of every metric: measured, or left out and why."""
    for metric in metrics:
        reason = why_not(metric, material)
        if reason is None:
            try:
                yield metric.measure(metric, material)
                continue
            except ValueError as error:
                reason = str(error)
        yield Result(metric.name, left_out=reason)


def why_not(metric: Metric, material: Material) -> str | None:
    """What a metric lacks, in words; None where it can be tried."""
    if "reference" in metric.needs and not material.all_references:
        return "no --reference"
    if "prompts" in metric.needs and material.prompts is None:
        return "no --prompts"
    if reason := material.weights.missing(metric.weights):
        return reason
    if metric.package and find_spec(metric.package[0]) is None:
        return f"no package {metric.package[1]}: pip install {metric.package[1]}"
    return None
