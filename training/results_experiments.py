"""The part of docs/RESULTS.md that the experiments make (experiments.py): tables laid out as the paper's,
with the paper's own figures beside them, and two plots.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from .result_choices import choices_table
from .result_figures import Experiments, Rows, against, gap_closed, mean_and_spread
from .result_tables import (
    AGAIN,
    BUDGETS,
    FACTOR,
    LOFA,
    MEASURES,
    METHODS,
    TABLES,
    YARDSTICK,
    Line,
    Table,
)

_OF_COSINES = """\
Centred: both maps less the mean map of the 32 training LoRAs. What is left of it then is partly that mean's
own noise, which stands on both sides. Between tasks: each set of maps less its own mean over the held-out
tasks, so that only what tells tasks apart counts; a map that is the same for all of them scores 0."""
_OF_STAGE1 = """\
Between tasks, as above. The most possible for a map that has only the task to go by is the square root of
what two trainings of one task agree by. "To N trainings": to how often each entry responds in N trainings of
the task, which says more of how probable a response is than any one of them, beside its own most possible
(Spearman and Brown's formula)."""


def table_of(found: Experiments, table: Table) -> list[str]:
    """Markdown; lines that were not run are left out, and so is a table of one line alone."""
    lofa = found.rows(Line("", LOFA))
    extra: list[tuple[str, Callable[[Line, Rows], str]]] = []
    if table.against_lofa:
        extra += [
            ("all right, from LoFA", lambda line, rows: _from_lofa(line, lofa, rows, "joint", 3)),
            ("Frechet, from LoFA", lambda line, rows: _from_lofa(line, lofa, rows, "frechet", 2)),
        ]
    extra += [
        ("gap closed, all right", lambda line, rows: mean_and_spread(gap_closed(found, rows, "joint"), 2)),
        ("gap closed, Frechet", lambda line, rows: mean_and_spread(gap_closed(found, rows, "frechet"), 2)),
    ]
    headings = ["", "seeds", *(title for title, _ in MEASURES.values()), *(title for title, _ in extra)]
    headings += table.paper
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for line in table.lines:
        rows = found.rows(line)
        if not rows:
            continue
        cells = [line.label, str(len(rows))]
        for measure, (_, digits) in MEASURES.items():
            cells.append(mean_and_spread([row[measure] for row in rows.values() if measure in row], digits))
        cells += [make(line, rows) for _, make in extra]
        cells += line.paper or ("",) * len(table.paper)
        lines.append("| " + " | ".join(cells) + " |")
    return lines if len(lines) > 3 else []


def _from_lofa(line: Line, lofa: Rows, rows: Rows, measure: str, digits: int) -> str:
    own = line.experiment == LOFA and line.prompt == "coarse"
    return "" if own else against(lofa, rows, measure, digits)


def factors_table(found: Experiments) -> list[str]:
    """Markdown: the share of clips that show each factor right, of the seeds that say so."""
    rows = {line.label: list(found.rows(line).values()) for line in METHODS.lines}
    told = {label: told for label, all_ in rows.items() if (told := [row for row in all_ if _factors(row)])}
    if not told:
        return []
    names = _factors(next(iter(told.values()))[0])
    lines = [f"| | seeds | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for label, seeds in told.items():
        cells = [mean_and_spread([row[FACTOR + name] for row in seeds], 2) for name in names]
        lines.append(f"| {label} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def _factors(row: dict[str, float]) -> list[str]:
    return [name.removeprefix(FACTOR) for name in row if name.startswith(FACTOR)]


def response_table(found: Experiments) -> list[str]:
    """Markdown: the cosines of section 4.4, beside what the mean map gets."""
    figures = found.response(LOFA) | found.response(AGAIN)
    if "stage1_cosine" not in figures:
        return []
    headings = ("response maps", "cosine", "centred cosine", "between tasks", "the paper's cosine")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for label, name, paper in (
        ("Stage I to the per-task LoRA's", "stage1", "0.77"),
        ("Stage II to Stage I", "stage2_to_stage1", "0.91"),
        ("Stage II to the per-task LoRA's", "stage2", "0.83"),
        ("a per-task LoRA's to those of another training", "repeat", ""),
        ("ridge regression of maps on true factors", "ridge_map", ""),
        ("the mean training map to the per-task LoRA's", "mean_map", ""),
        ("small weights to the per-task LoRA's", "small_weight", ""),
    ):
        of = (f"{name}_cosine", f"{name}_centred_cosine", f"{name}_task_cosine")
        cells = [mean_and_spread(figures.get(key, []), 3) for key in of]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} | {paper} |")
    return lines


def most_possible(agree: float, trainings: float) -> float:
    """The cosine between a map that has only the task to go by and the mean map of that many trainings, where
    single ones agree by `agree` with each other (Spearman and Brown's formula).
    """
    return math.sqrt(trainings * agree / (1.0 + (trainings - 1.0) * agree))


def loras_table(found: Experiments) -> list[str]:
    """Markdown: Stage I alone, by what it learns from."""
    alone = [name for name in found.seeds if found.of(name, "loras")]
    trained = sorted({int(n) for name in alone for n in found.response(name).get("trainings", [])})
    headings = ("Stage I", "LoRAs", "seeds", "between tasks", "of the most possible")
    headings += (f"to {' or '.join(map(str, trained)) or 'several'} trainings", "of the most possible")
    headings += ("ridge regression of maps", "centred cosine", "cosine", "mean map, cosine")
    repeat, rows = found.response(AGAIN).get("repeat_task_cosine", []), []
    agree = max(0.0, statistics.fmean(repeat)) if repeat else 0.0
    for name in alone:
        (count,), cosines = set(found.of(name, "loras")), found.response(name)
        between, often = (cosines.get(f"stage1_{of}task_cosine", []) for of in ("", "often_"))
        pairs = zip(often, cosines.get("trainings", []), strict=True)
        shown = [
            mean_and_spread(values, 3)
            for values in (
                between,
                [cosine / most_possible(agree, 1) for cosine in between if agree],
                often,
                [cosine / most_possible(agree, count) for cosine, count in pairs if agree],
                *(
                    cosines.get(key, [])
                    for key in (
                        "ridge_map_task_cosine", "stage1_centred_cosine", "stage1_cosine", "mean_map_cosine",
                    )
                ),
            )
        ]  # fmt: skip
        label = name.removeprefix("Stage I, ")
        rows.append((count, f"| {label} | {count} | {len(found.seeds[name])} | {' | '.join(shown)} |"))
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    return lines + [row for _, row in sorted(rows)] if rows else []


def bases_table(found: Experiments) -> list[str]:
    """Markdown: networks trained over several bases, on the first of them and on two they never saw."""
    lines = [
        "| bases | network | seeds | factors right, first base | unseen bases | Frechet distance, first base "
        "| unseen bases |"
    ]
    lines.append("|---" * 7 + "|")
    for family in ("styles", "swapped"):
        for label, name in (
            ("none", f"base, {family}"),
            ("none: the first base's per-task LoRAs", f"per-task LoRA, {family}"),
            ("true W", f"{family}, true W"),
            ("random constants", f"{family}, random constants"),
        ):
            seeds = [one for one in found.seeds.get(name, {}).values() if "bases" in one]
            if not seeds:
                continue
            cells = []
            for measure, digits in (("mean_accuracy", 3), ("frechet", 2)):
                first = [one["rows"]["coarse"][measure] for one in seeds]
                unseen = [statistics.fmean(row[measure] for row in one["bases"].values()) for one in seeds]
                cells += [mean_and_spread(first, digits), mean_and_spread(unseen, digits)]
            lines.append(f"| {family} | {label} | {len(seeds)} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def spread_table(found: Experiments) -> list[str]:
    """Markdown: how far LoRA Diffusion's draws are apart."""
    spreads = found.of("LoRA Diffusion", "spread")
    if not spreads:
        return []
    lines = ["| relative distance of dW | |", "|---|---|"]
    for label, name in (
        ("draws of LoRA Diffusion for one condition", "between_seeds"),
        ("draws of one seed for different conditions", "between_conditions"),
        ("per-task LoRAs of different tasks", "between_tasks"),
    ):
        lines.append(f"| {label} | {mean_and_spread([one[name] for one in spreads], 2)} |")
    return lines


def seconds_table(found: Experiments) -> list[str]:
    """Markdown: what a personalisation costs."""
    lines = ["| | seconds | parameters |", "|---|---|---|"]
    for name in (LOFA, "Text-to-LoRA MLP, our losses", "LoRA Diffusion"):
        seconds, parameters = found.of(name, "seconds"), found.of(name, "parameters")
        if seconds:
            lines.append(f"| {name} | {mean_and_spread(seconds, 3)} | {parameters[0]:,.0f} |")
    for steps, name in BUDGETS.items():
        if seconds := found.of(name, "seconds"):
            lines.append(f"| {YARDSTICK}, {steps} steps | {mean_and_spread(seconds, 1)} | |")
    return lines if len(lines) > 2 else []


def plots(found: Experiments, folder: Path) -> list[str]:
    """Figure 8 and the budgets of per-task LoRAs as PNGs in `folder`; their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = {"LoFA": LOFA, "without response": "without response"}
    methods["Text-to-LoRA MLP"] = "Text-to-LoRA MLP, our losses"
    curves = {
        "tasks": {
            label: {
                count: found.rows(Line("", whole if count == 448 else f"{label}, {count} tasks"))
                for count in (32, 64, 128, 256, 448)
            }
            for label, whole in methods.items()
        },
        "budget": {
            f"per-task LoRA, {prompt} prompt": {
                steps: found.rows(Line("", name, prompt)) for steps, name in BUDGETS.items()
            }
            for prompt in ("coarse", "fine")
        },
    }
    axes_of = {"tasks": "training tasks", "budget": "training steps of a LoRA"}
    written = []
    for name, lines in curves.items():
        lines = {label: {x: rows for x, rows in line.items() if rows} for label, line in lines.items()}
        if max(map(len, lines.values())) < 2:
            continue
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
        for panel, measure in zip(panels, ("joint", "frechet"), strict=True):
            for label, line in lines.items():
                values = [[row[measure] for row in rows.values()] for rows in line.values()]
                middle = [statistics.fmean(each) for each in values]
                spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
                panel.errorbar(list(line), middle, spread, marker="o", capsize=3, label=label)
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted({x for line in lines.values() for x in line}))
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.set_xlabel(axes_of[name])
            panel.set_ylabel(MEASURES[measure][0])
            panel.grid(alpha=0.3)
        if name == "budget":
            for panel, measure in zip(panels, ("joint", "frechet"), strict=True):
                for prompt, style in (("coarse", "--"), ("fine", ":")):
                    if rows := found.rows(Line("", LOFA, prompt)):
                        level = statistics.fmean(row[measure] for row in rows.values())
                        panel.axhline(level, color="black", linestyle=style, label=f"LoFA, {prompt} prompt")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
        figure.savefig(folder / f"experiments_{name}.png", dpi=110)
        pyplot.close(figure)
        written.append(f"experiments_{name}.png")
    return written


def section(folder: Path, pictures: Path) -> list[str]:
    """The whole part of the page; the plots go into `pictures`, beside the page."""
    found = Experiments(folder)
    lines = ["", "## Experiments", ""]
    machines = sorted({one["machine"] for seeds in found.seeds.values() for one in seeds.values()})
    lines += [
        "Shorter runs than the networks above, text alone, all with the same tasks, steps and seeds",
        "(`python -m training.experiments --config training/configs/experiments.toml`): means and standard",
        'deviations over seeds. A column "from LoFA" has the difference seed by seed with its',
        "standard error, bold beyond two of them. The paper's own figures are from WAN2.1-1.3B at full size.",
        f"Machine: {', '.join(machines)}.",
    ]
    if rows := choices_table(found):
        lines += [
            "",
            "### Choices of the design, one by one",
            "",
            "What becomes of held-out tasks when one thing is decided otherwise: the difference, seed by",
            "seed, with a standard error from the rows of this table together (thresholds and blocks aside,",
            "which share most of LoFA's own training). A choice helps or hurts where the difference is",
            "beyond two of them on either measure, over three seeds or more; by chance up to one row in ten",
            "is. Most rows are compared with the same three trainings of LoFA, whose noise they share.",
            "",
            *rows,
        ]
    for table in TABLES:
        if rows := table_of(found, table):
            lines += ["", f"### {table.title}", "", *([table.words, ""] if table.words else []), *rows]
    for title, words, rows in (
        ("Factor by factor", "", factors_table(found)),
        ("Response maps (section 4.4)", _OF_COSINES, response_table(found)),
        ("Stage I, by the LoRAs that it learns from", _OF_STAGE1, loras_table(found)),
        ("Bases it never saw: true W and random constants", "", bases_table(found)),
        ("How far draws are apart", "", spread_table(found)),
        ("Seconds for one personalisation", "", seconds_table(found)),
    ):
        if rows:
            lines += ["", f"### {title}", "", *([words, ""] if words else []), *rows]
    for picture in plots(found, pictures):
        lines += ["", f"![{picture.removesuffix('.png')}]({picture})"]
    return lines
