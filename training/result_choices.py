"""What each choice of the design brings: the table of docs/RESULTS.md, with errors pooled over its rows."""

import math
import statistics
from collections.abc import Sequence

from .result_figures import Experiments, by_seed
from .result_tables import CHOICES, MEASURES, Choice, Line


def pooled_deviation(differences: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation of one difference about its group's mean, of all groups together: three seeds
    tell too little of their own. None where no group has two.
    """
    squares = [sum((x - statistics.fmean(group)) ** 2 for x in group) for group in differences if group]
    freedom = sum(len(group) - 1 for group in differences if group)
    return math.sqrt(sum(squares) / freedom) if freedom else None


def verdict(gains: Sequence[float], errors: Sequence[float]) -> str:
    """What measures say of a choice together: its gain in each and the standard error of that."""
    helps = any(gain > 2.0 * error for gain, error in zip(gains, errors, strict=True))
    hurts = any(gain < -2.0 * error for gain, error in zip(gains, errors, strict=True))
    if helps and hurts:
        return "one measure helped, one hurt"
    return "helps" if helps else "hurts" if hurts else "no difference seen"


def choices_table(found: Experiments, choices: Sequence[Choice] = CHOICES) -> list[str]:
    """Markdown: each choice of the design, what was measured without it, and what that says of it."""
    pairs = [
        (choice, line, found.rows(Line("", choice.chosen)), rows)
        for choice in choices
        for line in choice.others
        if (rows := found.rows(line)) and found.rows(Line("", choice.chosen)).keys() & rows.keys()
    ]
    measures = {"joint": 1.0, "frechet": -1.0}  # which way is better
    deviations = {
        measure: pooled_deviation(
            [by_seed(chosen, rows, measure) for choice, _, chosen, rows in pairs if not choice.near]
        )
        for measure in measures
    }
    headings = ("the choice", "instead", "seeds", *(MEASURES[measure][0] for measure in measures))
    lines = [f"| {' | '.join(headings)} | what that says of it |", "|---" * (1 + len(headings)) + "|"]
    for choice, line, chosen, rows in pairs:
        cells, gains, errors = [], [], []
        for measure, better in measures.items():
            differences, deviation = by_seed(chosen, rows, measure), deviations[measure]
            if deviation is None:
                return []
            mean, error = statistics.fmean(differences), deviation / math.sqrt(len(differences))
            digits = MEASURES[measure][1]
            cells.append(f"{mean:+.{digits}f} ± {error:.{digits}f}")
            gains.append(-better * mean)
            errors.append(error)
        count = len(chosen.keys() & rows.keys())
        says = verdict(gains, errors) if count >= 3 else ""  # rows share their chosen one, and its noise
        lines.append(f"| {choice.what} | {line.label} | {count} | {' | '.join(cells)} | {says} |")
    return lines if len(lines) > 2 else []
