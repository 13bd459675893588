"""The README's figures, written from figures.json: no number is typed by hand."""

import textwrap
from pathlib import Path

from lofa_core.whole_files import write_whole

README = Path(__file__).parents[1] / "README.md"
_START, _END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def figures_text(figures: dict) -> str:
    """The table and its summary, in Markdown, of what `evaluate` and the miniature's maker measured."""
    found = figures["hypernetwork"]
    lines = _table(found["rows"], "all six factors right")
    if "looks" in found:
        lines += ["", "Held-out looks (shirt, trousers, place), from one picture:", ""]
        lines += _table(found["looks"]["rows"], "all three right")
    if "both" in found:
        lines += [
            "",
            "A held-out action and a held-out look at once, the action in words, the look in a picture:",
        ]
        lines += ["", "| given | action right | look right | both right |", "|---|---|---|---|"]
        for name, row in found["both"]["rows"].items():
            shares = (row[measure] for measure in ("joint_action", "joint_look", "joint"))
            lines.append(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    vae, evaluator = figures["vae"], figures["evaluator"]
    points = (
        "Actions: of the gap between the base model and a LoRA trained for the task, LoFA closes "
        f"{_share(found['frechet_gap_closed'])} on the Frechet distance and "
        f"{_share(found['joint_gap_closed'])} on getting all factors right. On all three measures at "
        f"once it beats: {', '.join(found['beaten']) or 'none'}.",
        f"Stage I's response maps: cosine {found['stage1_cosine']:.3f} with the real maps; the mean training "
        f"map {found['mean_map_cosine']:.3f}, small |W| alone {found['small_weight_cosine']:.3f}; of what "
        f"tells tasks apart, Stage I has {found['stage1_task_cosine']:.3f}. "
        f"{_share(found['responding_share'])} of the entries respond.",
        f"The VAE rebuilds held-out clips at {vae['held_out_psnr_db']:.1f} dB; the evaluator reads all six "
        f"factors of {100 * evaluator['held_out_joint']:.1f}% of held-out drawn clips and of "
        f"{100 * evaluator['held_out_joint_through_vae']:.1f}% of those that went through the VAE.",
    )
    wrapped = [textwrap.fill(point, 120, initial_indent="- ", subsequent_indent="  ") for point in points]
    return "\n".join([*lines, "", *wrapped, ""])


def _table(rows: dict[str, dict[str, float]], joint: str) -> list[str]:
    lines = [
        f"| method | flow-matching loss | {joint} | factors right, mean | Frechet distance |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        loss = f"{row['flow_matching']:.4f}" if "flow_matching" in row else ""
        lines.append(
            f"| {name} | {loss} | {row['joint']:.3f} | {row['mean_accuracy']:.3f} | {row['frechet']:.2f} |"
        )
    return lines


def write_figures(figures: dict, readme: Path = README) -> None:
    """Replace what stands between the README's two marks. ValueError where a mark is missing."""
    text = readme.read_text(encoding="utf-8")
    if _START not in text or _END not in text:
        raise ValueError(
            f"{readme}: expected the lines {_START.strip()} and {_END.strip()} around the figures."
        )
    before, rest = text.split(_START, 1)
    after = rest.split(_END, 1)[1]
    write_whole(readme, before + _START + figures_text(figures) + _END + after)


def _share(value: float | None) -> str:
    return "an undefined share" if value is None else f"{100 * value:.0f}%"
