"""docs/RESULTS.md out of the runs' evaluations.

`python -m training.results text=runs/text pose=runs/pose style=runs/style all=runs/all
identity=runs/faces_identity` reads each run's evaluation.json and writes the tables of held-out figures:
every condition under the network trained for it alone, under the one for all and under others for all, with
fewer or more LoRAs (`fewer=...`, `more=...`), and identity on the second miniature. Runs that are not named
are left out.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from .results_experiments import section

MEASURES = {
    "joint": "all factors right",
    "mean_accuracy": "factors right",
    "frechet": "Frechet distance",
    "flow_matching": "flow matching",
}
TOGETHER = "all"  # the run of the network for all conditions
OTHERS = {"fewer": "for all, 32 LoRAs", "more": "for all, 128 LoRAs"}  # other networks for all conditions
KINDS = ("text", "pose", "style")
IDENTITY = "identity"  # the run on the second miniature
NAMES = (*KINDS, TOGETHER, *OTHERS, IDENTITY)


def row_of(found: dict, kind: str) -> dict[str, float] | None:
    """A network's figures under one kind of condition; None where it does not know the kind."""
    table = found.get("looks") if kind == "style" else found
    if table is None or "rows" not in table:
        return None
    name = "LoFA" if table["condition"] == kind else f"LoFA, {kind}"
    return table["rows"].get(name)


def conditions_table(runs: dict[str, dict]) -> list[str]:
    """Markdown: each kind of condition, the network for it alone and the one for all, and their ratio; and
    the others for all.
    """
    lines = [
        "| condition | network | " + " | ".join(MEASURES.values()) + " |",
        "|---" * (2 + len(MEASURES)) + "|",
    ]
    for kind in KINDS:
        rows = {
            name: row
            for name, run in (
                ("for it alone", runs.get(kind)),
                ("for all", runs.get(TOGETHER)),
                *((label, runs.get(name)) for name, label in OTHERS.items()),
            )
            if run is not None and (row := row_of(run, kind)) is not None
        }
        for name, row in rows.items():
            lines.append(f"| {kind} | {name} | " + " | ".join(_shown(m, row[m]) for m in MEASURES) + " |")
        if {"for it alone", "for all"} <= rows.keys():
            alone, both = rows["for it alone"], rows["for all"]
            ratios = (f"{both[m] / alone[m]:.2f}" if alone[m] else "-" for m in MEASURES)
            lines.append(f"| | for all / alone | {' | '.join(ratios)} |")
    return lines


def both_table(run: dict) -> list[str]:
    """Markdown: a held-out action and a held-out look asked for at once."""
    lines = [
        "| given | action right | look right | both right | Frechet distance |",
        "|---|---|---|---|---|",
    ]
    for name, row in run["both"]["rows"].items():
        figures = (row["joint_action"], row["joint_look"], row["joint"])
        lines.append(f"| {name} | " + " | ".join(f"{x:.3f}" for x in figures) + f" | {row['frechet']:.2f} |")
    return lines


def reference_tables(run: dict) -> list[str]:
    """Markdown: what surrounds LoFA in the run's own tables of actions and looks."""
    lines = []
    for title, table in (("Actions", run), ("Looks", run.get("looks"))):
        if table is None or "rows" not in table:
            continue
        lines += ["", f"### {title}", "", "| method | " + " | ".join(MEASURES.values()) + " |"]
        lines.append("|---" * (1 + len(MEASURES)) + "|")
        for name, row in table["rows"].items():
            shown = (_shown(m, row[m]) if m in row else "" for m in MEASURES)
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def identity_table(found: dict) -> list[str]:
    """Markdown, as the paper's table 3: identity similarity, diversity, seconds; and what our world adds."""
    lines = [
        "| method | identity similarity | diversity | traits right | proportions R2 | Frechet distance "
        "| in scenes: identity similarity | in scenes: scene right | seconds |",
        "|---" * 9 + "|",
    ]
    for name, row in found["rows"].items():
        scenes, seconds = row["scenes"], found["seconds"].get(name)
        figures = [
            f"{row['identity_similarity']:.3f}",
            f"{row['diversity']:.2f}",
            f"{row['factors_right_mean']:.3f}",
            f"{row['proportions_r2']:.2f}",
            f"{row['frechet']:.2f}",
            f"{scenes['identity_similarity']:.3f}",
            f"{scenes['attributes_right']:.3f}",
            "" if seconds is None else f"{seconds:.2f}",
        ]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return lines


def hybrid_table(found: dict) -> list[str]:
    """Markdown: LoRAs in scenes under plain CFG, and under HM-CFG with several weights."""
    names = dict.fromkeys(row["method"] for row in found["hybrid"])
    rows = [(name, f"CFG {found['scene_guidance']:g}", found["rows"][name]["scenes"]) for name in names]
    rows += [
        (row["method"], f"HM-CFG, w_base {row['w_base']:g}, w_subject {row['w_subject']:g}", row)
        for row in found["hybrid"]
    ]
    lines = [
        "| LoRA | guidance | identity similarity | scene right | diversity | Frechet distance |",
        "|---" * 6 + "|",
    ]
    for name, guidance, row in sorted(rows, key=lambda row: list(found["rows"]).index(row[0])):
        figures = (f"{row['identity_similarity']:.3f}", f"{row['attributes_right']:.3f}")
        lines.append(
            f"| {name} | {guidance} | {' | '.join(figures)} | {row['diversity']:.2f} | {row['frechet']:.2f} |"
        )
    return lines


def sheets(pictures: Path) -> list[str]:
    """Markdown: the before/after sheets that lie there (made by miniature.sheets and faces.identity)."""
    found = [(name, pictures / f"condition_{name}.png") for name in (*KINDS, "text_style", IDENTITY)]
    lines = []
    for name, path in found:
        if path.exists():
            lines += ["", f"{name.replace('_', ' and ').capitalize()}:", "", f"![{path.stem}]({path.name})"]
    return lines


def _shown(measure: str, value: float) -> str:
    return f"{value:.{ {'frechet': 2, 'flow_matching': 4}.get(measure, 3) }f}"


def document(
    runs: dict[str, dict], command: str, experiments: Path | None = None, pictures: Path = Path("docs")
) -> str:
    """The whole page. `experiments` is the folder of those; their plots go into `pictures`, beside the page,
    where the sheets are looked for.
    """
    lines = [
        "# Results",
        "",
        "Measured on the miniature, on tasks that LoRAs and hypernetwork never saw: held-out actions in",
        "wordings reserved for this and in poses of new clips, held-out looks from a picture. (The base",
        "model has seen the looks, not the actions.) Written by",
        f"`{command}`.",
        "",
        "## Each condition alone, and one network for all",
        "",
        *conditions_table(runs),
    ]
    if runs.keys() & OTHERS.keys():
        lines += [
            "",
            "The network for all is the shipped one: Stage I learns from the LoRAs of 128 actions and 128",
            "looks, Stage II has those of 32 and 32. The others for all have 32 and 32, or 128 and 128, in",
            "both stages; docs/TRAINING.md says what else they differ in.",
        ]
    if "both" in runs.get(TOGETHER, {}):
        lines += ["", "## Text and style at once", "", *both_table(runs[TOGETHER])]
    if TOGETHER in runs:
        lines += ["", "## The network for all beside its baselines", *reference_tables(runs[TOGETHER])]
    if IDENTITY in runs:
        found = runs[IDENTITY]["identity"]
        diversity = next(iter(found["rows"].values()))["diversity_real"]
        lines += [
            "",
            "## Identity from one picture, on the second miniature",
            "",
            f"{found['people']} people whom neither base nor LoRAs nor hypernetwork saw,",
            f"{found['each']} pictures of each, read by an evaluator; the paper's table 3 in small. First",
            "under the coarse prompt, then in scenes that a prompt asks for (expression, turn, clothes,",
            f"place, light), with guidance. Drawn pictures of a person have a diversity of {diversity:.2f}.",
            "",
            *identity_table(found),
            "",
            "The same scenes, where HM-CFG guides with the base model beside the LoRA (its paper's",
            'purpose: the base keeps the composition, the LoRA brings the subject). "End to end" was',
            "trained as that paper's hypernetwork: from pictures alone, without LoRAs.",
            "",
            *hybrid_table(found),
        ]
    if seen := sheets(pictures):
        lines += [
            "",
            "## Before and after",
            "",
            "The base model, and the same noise with the predicted LoRA;",
        ]
        lines += ["tasks that nothing was trained on.", *seen]
    if experiments is not None:
        lines += section(experiments, pictures)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help=", ".join(NAMES))
    parser.add_argument("--experiments", type=Path, help="the folder with the experiments' figures")
    parser.add_argument("--out", type=Path, default=Path("docs/RESULTS.md"))
    chosen = parser.parse_args()
    runs = {}
    for text in chosen.runs:
        name, _, folder = text.partition("=")
        path = Path(folder) / "evaluation.json"
        if name not in NAMES or not path.is_file():
            parser.error(f"{text}: expected one of {', '.join(NAMES)}, then = and a run that was evaluated")
        runs[name] = json.loads(path.read_text(encoding="utf-8"))
    command = "python -m training.results " + " ".join(chosen.runs)
    if chosen.experiments is not None:
        command += f" --experiments {chosen.experiments}"
    page = document(runs, command, chosen.experiments, chosen.out.parent)
    chosen.out.write_text(page, encoding="utf-8")
    Console(highlight=False).print(f"wrote {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
