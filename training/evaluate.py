"""Held-out evaluation: tasks that base, LoRAs and hypernetwork never saw, in sentences worded as training
never did, poses and pictures it never saw.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from rich.table import Table

from lofa_core.hypernetwork import Hypernetwork
from lofa_core.lora_diffusion import LoRADiffusion

from .baselines.simple import mean_lora, nearest_lora, ridge_lora
from .config import EvaluationConfig
from .factors import Factors
from .judge import Judge, Method, predicted_factors, response_figures
from .looks import Predictor
from .lora_dataset import LoRADataset
from .lora_diffusion import drawn_factors, spread
from .miniature import evaluator as evaluator_module
from .miniature.tasks import MiniatureTasks
from .miniature.world_tasks import WorldTask

BASELINES = ("base", "mean LoRA", "nearest LoRA", "ridge regression")
Report = Callable[[str, dict[str, float]], None]
Told = list[dict[str, Any]]


@dataclass(frozen=True)
class Sharing:
    """Which of a table's rows this process measures."""

    process: int = 0
    processes: int = 1


def evaluate(
    hypernetwork: Hypernetwork,
    data: MiniatureTasks,
    settings: EvaluationConfig,
    known: LoRADataset,
    wanted: LoRADataset,
    evaluator: evaluator_module.Evaluator,
    report: Report = lambda name, figures: None,
    sharing: Sharing = Sharing(),
    more: bool = False,
    others: Mapping[str, Predictor] | None = None,
    diffusion: LoRADiffusion | None = None,
) -> dict:
    """All tables with their summaries; `known` are the training LoRAs, `wanted` those of the held-out tasks.
    `more` adds what a known wording, guidance and strength would do, `others` rows of other predictors,
    `diffusion` a row and how far its LoRAs of several seeds are apart.

    Actions: "rows" and their summary. Looks, and both at once, likewise under "looks" and "both".
    """
    if wanted.tasks != data.held_out:
        raise ValueError(
            f"the held-out LoRAs are of {len(wanted.tasks)} tasks that are not this configuration's "
            f"{len(data.held_out)} held-out ones. Train them with the same [data] table."
        )
    found: dict[str, Any] = {}
    for kinds, place in ((("text", "pose"), None), (("style",), "looks")):
        asked = [kind for kind in kinds if kind in data.kinds]
        if not asked:
            continue
        of_sort = _of_sort(known, place == "looks"), _of_sort(wanted, place == "looks")
        table = _one_sort(
            hypernetwork,
            data,
            settings,
            *of_sort,
            asked,
            evaluator,
            report,
            sharing,
            more,
            others or {},
            diffusion,
        )
        found |= table if place is None else {place: table}
    if {"text", "style"} <= set(data.kinds):
        found["both"] = _both(hypernetwork, data, settings, evaluator, report, sharing)
    return found


def _of_sort(loras: LoRADataset, looks: bool) -> LoRADataset:
    """Those of looks, or of actions."""
    rows = [row for row, task in enumerate(loras.tasks) if (task.action is None) == looks]
    return LoRADataset(loras.loras[torch.tensor(rows)], [loras.tasks[row] for row in rows])


def _one_sort(
    hypernetwork, data, settings, known, wanted, kinds, evaluator, report, sharing, more, others, diffusion
) -> dict:
    """The table of actions, or of looks, under each of `kinds`."""
    judge = Judge(data, wanted.tasks, settings, evaluator)
    told = {kind: held_out_conditions(data, judge, kind) for kind in kinds}
    indices = known.indices(), wanted.indices()
    methods = [
        Method("base", None),
        Method("base, fine prompt", None, "fine"),
        Method("mean LoRA", mean_lora(known.loras, len(wanted.tasks))),
        Method("nearest LoRA", nearest_lora(known.loras, *indices)),
        Method("ridge regression", ridge_lora(known.loras, *indices)),
    ]
    for kind, conditions in told.items():
        name = "LoFA" if kind == kinds[0] else f"LoFA, {kind}"
        predicted = predicted_factors(hypernetwork, data, conditions)
        methods.append(Method(name, predicted))
        if kind == kinds[0]:
            methods.append(Method("LoFA, fine prompt", predicted, "fine"))
    for name, predictor in others.items():
        if kinds[0] in predictor.conditions:
            methods.append(Method(name, predicted_factors(predictor, data, told[kinds[0]])))
    if diffusion is not None:
        for kind in (kind for kind in kinds if kind in diffusion.conditions):
            name = "LoRA Diffusion" if kind == kinds[0] else f"LoRA Diffusion, {kind}"
            methods.append(Method(name, drawn_factors(diffusion, data, told[kind])))
    methods += [
        Method("per-task LoRA", wanted.loras),
        Method("per-task LoRA, fine prompt", wanted.loras, "fine"),
    ]
    if more:
        first = next(method.factors for method in methods if method.name == "LoFA")
        methods += [
            Method("base, fine prompt in training's words", None, "plain fine"),
            Method("base, fine prompt, guidance 2.5", None, "fine", 2.5),
            Method("LoFA x 1.3", None if first is None else first.scaled(1.3)),
        ]
    rows = _measured(judge, methods, report, sharing)
    maps = response_figures(hypernetwork, data, told[kinds[0]], known, wanted)
    found = {"rows": rows, "condition": kinds[0], **summarise(rows), **maps}
    if diffusion is not None and kinds[0] in diffusion.conditions:
        found["lora_diffusion"] = spread(diffusion, data, told[kinds[0]], wanted.loras)
    return found


def _both(hypernetwork, data, settings, evaluator, report, sharing) -> dict:
    """Held-out actions in held-out looks: what each condition brings alone, and both together."""
    actions = [task for task in data.held_out if task.action is not None]
    looks = [task for task in data.held_out if task.look is not None]
    tasks = [WorldTask(a.action, b.look) for a, b in zip(actions, looks, strict=False)]
    judge = Judge(data, tasks, settings, evaluator)
    text, style = (held_out_conditions(data, judge, kind) for kind in ("text", "style"))
    loras = {
        "text": predicted_factors(hypernetwork, data, text),
        "style": predicted_factors(hypernetwork, data, style),
        "text + style": predicted_factors(
            hypernetwork, data, [a | b for a, b in zip(text, style, strict=True)]
        ),
    }
    methods = [Method("base", None), Method("base, fine prompt", None, "fine")]
    methods += [Method(f"LoFA, {name}", own) for name, own in loras.items()]
    methods.append(Method("both LoRAs added up", added(loras["text"], loras["style"])))
    return {"rows": _measured(judge, methods, report, sharing)}


def added(first: Factors, second: Factors) -> Factors:
    """LoRAs whose dW is the sum of both, at the sum of both ranks."""
    A = tuple(torch.cat(pair, -2) for pair in zip(first.A, second.A, strict=True))
    return Factors(A, tuple(torch.cat(pair, -1) for pair in zip(first.B, second.B, strict=True)))


def held_out_conditions(data: MiniatureTasks, judge: Judge, kind: str) -> Told:
    """One condition of this kind for each of the judge's tasks: a reserved wording of the action, a new
    clip's skeletons, a picture.
    """
    if kind == "text":
        if judge.tasks[0].look is None:
            return [{"text": sentence} for sentence in judge.sentences]
        rng = np.random.default_rng(judge.settings.seed)
        return [{"text": data.reserved_sentence(WorldTask(task.action), rng)} for task in judge.tasks]
    if kind == "pose":
        rng = np.random.default_rng(judge.settings.seed + 1)
        return [{"pose": data.pose(task, rng)} for task in judge.tasks]
    return [{"style": [(task.look, 0)]} for task in judge.tasks]


def _measured(
    judge: Judge, methods: list[Method], report: Report, sharing: Sharing
) -> dict[str, dict[str, float]]:
    """Each method's row, shared out among processes, and the real clips' own."""
    rows: dict[str, dict[str, float]] = {}
    for method in methods[sharing.process :: sharing.processes]:
        rows[method.name] = judge.measure(method)
        report(method.name, rows[method.name])
    if sharing.processes > 1:
        every = {name: row for part in gather_object([rows]) for name, row in part.items()}
        rows = {method.name: every[method.name] for method in methods}
    rows["real clips"] = judge.score(judge.real.latents.float())
    report("real clips", rows["real clips"])
    return rows


def summarise(rows: dict[str, dict[str, float]]) -> dict:
    """Gaps closed from base to per-task LoRA, and the baselines beaten on all three measures."""

    def closed(measure: str) -> float | None:
        base, ours, own = (rows[name][measure] for name in ("base", "LoFA", "per-task LoRA"))
        return (base - ours) / (base - own) if base != own else None  # no gap to close

    ours = rows["LoFA"]
    beaten = [
        name
        for name in BASELINES
        if ours["frechet"] < rows[name]["frechet"]
        and ours["flow_matching"] < rows[name]["flow_matching"]
        and ours["joint"] > rows[name]["joint"]
    ]
    return {"frechet_gap_closed": closed("frechet"), "joint_gap_closed": closed("joint"), "beaten": beaten}


def as_table(rows: dict[str, dict[str, float]]) -> Table:
    """For the console."""
    table = Table("method", "flow matching", "joint", "mean accuracy", "Frechet", "diversity")
    for name, row in rows.items():
        loss = f"{row['flow_matching']:.4f}" if "flow_matching" in row else ""
        table.add_row(
            name, loss, f"{row['joint']:.3f}", f"{row['mean_accuracy']:.3f}", f"{row['frechet']:.2f}",
            f"{row['diversity']:.3f}",
        )  # fmt: skip
    return table


def rounded(found: Any) -> Any:
    """All numbers in nested dictionaries to four digits."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    return round(found, 4) if isinstance(found, float) else found
