"""`python -m lofa_core evaluate`: measure the videos or pictures of a folder."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from . import __version__
from .command_checks import check_outputs, find_device
from .metrics.clips import read_folder, read_prompts, references_of
from .metrics.evaluation import METRICS, Material, Result, evaluate
from .metrics.weights import WEIGHTS, Weights
from .whole_files import write_whole

_SHOWN = 5  # skipped videos named on the screen; the JSON has all
_ABOUT = """\
files:
  Videos and pictures (a picture is a video of one frame) lie in DIR and its subfolders; other files are
  none of ours. What cannot be read is named and skipped.

pairs:
  A video is compared with the reference of the same name (suffix apart); one in a subfolder that has none
  with all references in the subfolder of that name, or the one file of that name (alice/03.png with
  alice.jpg); where there is but one reference, with that. FVD compares all with all. Face diversity is
  within each subfolder.

prompts:
  FILE.jsonl: {"video": "alice/03.mp4", "prompt": "..."} a line. Any other FILE: a prompt a line, in the
  order of the videos' names, those that cannot be read among them.
"""


def add_command(commands: Any) -> None:
    """The subcommand, with its parser."""
    width = max(map(len, WEIGHTS))
    names = "\n".join(f"  {name:<{width}}  {what}" for name, what in WEIGHTS.items())
    table = "\n".join(
        f"  {metric.title}: {metric.about}; {metric.better} is better"
        + (f"; --weights {', '.join(metric.weights)}" if metric.weights else "")
        + (f"; package {metric.package[1]}" if metric.package else "")
        for metric in METRICS
    )
    parser = commands.add_parser(
        "evaluate",
        help="measure generated videos or pictures",
        description="Measure generated videos or pictures. Nothing is downloaded: a metric whose weights, "
        "package, reference or prompts are missing is left out by name, the others run.",
        epilog=f"{_ABOUT}\nmetrics:\n{table}\n\nweights:\n{names}\n\n"
        "example: python -m lofa_core evaluate --videos out --reference real --prompts prompts.txt\n"
        "         --weights clip=clip-vit-large-patch14 --weights dino=dino-vits16 --json figures.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="what was generated")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="what it is compared with")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="what it was generated from")
    parser.add_argument(
        "--weights", type=_weights, action="append", default=[], metavar="NAME=PATH", help="see below"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to a .json")
    parser.add_argument(
        "--frames",
        type=_positive,
        default=16,
        metavar="N",
        help="looked at per video by CLIP, DINO, CSD and faces, evenly from first to last (default: 16)",
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: cuda where it is)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write. ValueError where no video can be read, or no metric could be measured."""
    check_outputs([(options.json, ".json")], [options.prompts])
    device = find_device(options.device)
    output = Console(soft_wrap=True, highlight=False)
    videos, unreadable = read_folder(options.videos)
    references, unreadable_references = read_folder(options.reference) if options.reference else ([], {})
    prompts: dict[str, str] | None = None
    unknown: list[str] = []
    if options.prompts:
        prompts, unknown = read_prompts(
            options.prompts, sorted([*unreadable, *(video.name for video in videos)])
        )
    material = Material(
        videos,
        references,
        references_of(videos, references),
        prompts,
        Weights(dict(options.weights), device),
        options.frames,
    )
    notes = {
        "unreadable videos": unreadable,
        "unreadable references": unreadable_references,
        "prompts without a video": dict.fromkeys(unknown, "no such video"),
    }
    output.print(f"{len(videos)} videos, {len(references)} references", markup=False)
    for title, found in notes.items():
        _print_names(output, title, found)

    results = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=len(METRICS))
        for result in evaluate(material):
            results.append(result)
            bar.update(task, advance=1)
    _print(output, results)
    if options.json:
        write_whole(options.json, _json(results, notes, options))
        output.print(f"wrote {options.json}", markup=False)
    if all(result.value is None for result in results):
        raise ValueError("no metric could be measured; the reasons are above.")


def _print(output: Console, results: list[Result]) -> None:
    by_name = {metric.name: metric for metric in METRICS}
    width = max(len(metric.title) for metric in METRICS) + 2
    for result in results:
        if result.value is not None:
            metric = by_name[result.name]
            counted = f" over {len(result.by_video)}" if result.by_video else ""
            output.print(
                f"{metric.title:<{width}}{result.value:.4f}{counted} ({metric.better} is better)",
                markup=False,
            )
            _print_names(output, "  skipped", result.skipped)
    for result in results:
        if result.left_out is not None:
            output.print(f"left out: {by_name[result.name].title} ({result.left_out})", markup=False)


def _print_names(output: Console, title: str, found: Mapping[str, str]) -> None:
    if not found:
        return
    shown = "; ".join(f"{name} ({reason.rstrip('.')})" for name, reason in list(found.items())[:_SHOWN])
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    output.print(f"{title}: {shown}{more}", markup=False)


def _json(results: list[Result], notes: dict[str, dict[str, str]], options: argparse.Namespace) -> str:
    document = {
        "lofa_version": __version__,
        "videos": str(options.videos),
        "reference": str(options.reference) if options.reference else None,
        "prompts": str(options.prompts) if options.prompts else None,
        "weights": {name: str(path) for name, path in options.weights},
        "frames": options.frames,
        "metrics": {
            result.name: {"value": result.value, "by_video": result.by_video, "skipped": result.skipped}
            for result in results
            if result.value is not None
        },
        "left_out": {result.name: result.left_out for result in results if result.left_out is not None},
        **{title.replace(" ", "_"): found for title, found in notes.items()},
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _weights(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if name not in WEIGHTS or not path:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=PATH with NAME one of {', '.join(WEIGHTS)}"
        )
    return name, Path(path)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number
