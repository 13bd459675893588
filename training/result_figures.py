"""The figures of experiments.py, read from their folder, and how one method compares to another."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .result_tables import BASE, YARDSTICK, Line

Rows = dict[int, dict[str, float]]  # by seed


class Experiments:
    """All figures in a folder of experiments.py."""

    def __init__(self, folder: Path):
        files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        self.seeds = {found["name"]: found["seeds"] for found in files}

    def rows(self, line: Line) -> Rows:
        """The figures of each seed under the line's prompt; nothing where it was not run."""
        found = self.seeds.get(line.experiment, {})
        return {
            int(seed): one["rows"][line.prompt] for seed, one in found.items() if line.prompt in one["rows"]
        }

    def of(self, experiment: str, name: str) -> list[Any]:
        """One figure beside the rows, such as "seconds", of each seed that has it."""
        return [one[name] for one in self.seeds.get(experiment, {}).values() if name in one]

    def response(self, experiment: str) -> dict[str, list[float]]:
        """An experiment's cosines of response maps, each of the seeds that have it."""
        cosines: dict[str, list[float]] = {}
        for found in self.of(experiment, "response"):
            for name, value in found.items():
                cosines.setdefault(name, []).append(value)
        return cosines


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several, the standard deviation."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def by_seed(ours: Rows, theirs: Rows, measure: str) -> list[float]:
    """Their differences from ours, of the seeds that both have."""
    return [theirs[seed][measure] - ours[seed][measure] for seed in sorted(ours.keys() & theirs.keys())]


def against(ours: Rows, theirs: Rows, measure: str, digits: int) -> str:
    """Their difference from ours, paired by seed; bold where it is beyond two standard errors of three or
    more seeds.
    """
    differences = by_seed(ours, theirs, measure)
    if not differences:
        return ""
    mean = statistics.fmean(differences)
    if len(differences) < 3:
        return f"{mean:+.{digits}f}"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    shown = f"{mean:+.{digits}f} ± {error:.{digits}f}"
    return f"**{shown}**" if abs(mean) > 2.0 * error else shown


def gap_closed(found: Experiments, rows: Rows, measure: str) -> list[float]:
    """Of the way from the base to the per-task LoRA, the share that a method goes; one number a seed."""
    base, own = found.rows(Line("", BASE)), found.rows(Line("", YARDSTICK))
    seeds = rows.keys() & base.keys() & own.keys()
    return [
        (rows[seed][measure] - base[seed][measure]) / (own[seed][measure] - base[seed][measure])
        for seed in sorted(seeds)
        if own[seed][measure] != base[seed][measure]
    ]
