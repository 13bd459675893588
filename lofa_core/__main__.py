"""The command line: `python -m lofa_core predict | convert | inspect | evaluate`."""

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from . import __version__, miniature
from .base_models import BaseWeights
from .checkpoint import load_generator, save_hypernetwork
from .command_checks import check_outputs, find_device
from .console import Parser, complain
from .generators import predict
from .heatmap import render
from .inspection import inspect
from .lora_diffusion import LoRADiffusion
from .lora_files import match, save_lora, write_safetensors
from .memory import at_a_time, out_of_memory
from .prediction import Prediction
from .released import load_released
from .steps import Watch
from .whole_files import whole_file

try:
    from PIL import Image
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

    from . import command_evaluate
    from .command_conditions import add_arguments, input_files, read_conditions
except ImportError as error:  # ComfyUI's Python has no rich
    sys.exit(f"error: the command line needs the package {error.name}: pip install rich pillow")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXAMPLE = "a person swings the left arm widely and quickly, moves to the right, leaning left, feet together"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for what the user can put right, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.filename and error.strerror:
            complain(f"{error.filename}: {error.strerror}.")
        else:
            complain(str(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        complain("interrupted.")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m lofa_core", description="LoFA: predict an ordinary LoRA from a sentence.")
    parser.add_argument("--version", action="version", version=f"LoFA {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    predict_ = commands.add_parser(
        "predict",
        help="predict a LoRA and write it to a file",
        description="Predict a LoRA and write it to a file that ComfyUI and diffusers load. Without "
        "--hypernetwork and --base, the miniature in this repository is used; it needs no download.",
        epilog=f'example: python -m lofa_core predict --prompt "{EXAMPLE}" --out lora.safetensors',
    )
    add_arguments(predict_)
    predict_.add_argument("--out", type=Path, required=True, metavar="LORA", help="the .safetensors to write")
    predict_.add_argument("--hypernetwork", type=Path, metavar="H", help="a LoFA hypernetwork (.safetensors)")
    predict_.add_argument(
        "--base", type=Path, metavar="BASE", help="the base model: a file, an index or a folder"
    )
    predict_.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: cuda where it is)"
    )
    predict_.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the computation (default: float32)"
    )
    predict_.add_argument(
        "--strength", type=_finite, default=1.0, metavar="X", help="multiplies the LoRA (default: 1)"
    )
    predict_.add_argument(
        "--response-out", type=Path, metavar="R", help="also write the response maps (.safetensors)"
    )
    predict_.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="LoRA Diffusion draws another LoRA for another one"
    )
    predict_.add_argument("--heatmap", type=Path, metavar="PNG", help="also draw the response maps")
    predict_.set_defaults(run=_predict)

    convert = commands.add_parser(
        "convert",
        help="make one hypernetwork file of LoFA_v0's two",
        description="Write the two published files of LoFA_v0 as one .safetensors that predict and the "
        "ComfyUI nodes load. Nothing is lost: the same LoRAs come out of it, bit for bit (not with --int8).",
    )
    for stage in ("stage1", "stage2"):
        convert.add_argument(
            f"--{stage}", type=Path, required=True, metavar="PTH", help=f"the published {stage}_preview.pth"
        )
    convert.add_argument("--out", type=Path, required=True, metavar="H", help="the .safetensors to write")
    convert.add_argument(
        "--int8",
        action="store_true",
        help="in eight bits by rows: half the size of half precision, nearly the same LoRAs",
    )
    convert.set_defaults(run=_convert)

    inspect_ = commands.add_parser(
        "inspect",
        help="say what a file is",
        description="Say in plain words what a hypernetwork, base model or LoRA is and what it fits.",
    )
    inspect_.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file, an index or a folder")
    inspect_.set_defaults(run=_inspect)

    command_evaluate.add_command(commands)
    return parser


def _predict(options: argparse.Namespace) -> None:
    hypernetwork_file = options.hypernetwork or miniature.HYPERNETWORK
    base_path = options.base or miniature.FOLDER
    check_outputs(
        [(options.out, ".safetensors"), (options.response_out, ".safetensors"), (options.heatmap, ".png")],
        [hypernetwork_file, base_path, *input_files(options)],
    )
    device = find_device(options.device)

    hypernetwork = load_generator(hypernetwork_file, DTYPES[options.dtype])
    if isinstance(hypernetwork, LoRADiffusion) and (options.response_out or options.heatmap):
        raise ValueError(
            f"{hypernetwork_file.name}: a LoRA Diffusion, which predicts no response maps. Leave out "
            "--response-out and --heatmap, or name a hypernetwork."
        )
    base = BaseWeights.open(base_path)
    conditions = read_conditions(options, hypernetwork.conditions, base_path)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"predicting {len(base.model.layers)} layers", total=None)
        prediction = predict(
            hypernetwork,
            base,
            conditions,
            seed=options.seed,
            device=device,
            dtype=DTYPES[options.dtype],
            watch=Watch(lambda done, total: bar.update(task, completed=done, total=total)),
        )
    metadata = {
        **prediction.lora.metadata,
        "lofa_version": __version__,
        "lofa_hypernetwork_sha256": _sha256(hypernetwork_file),
        "lofa_strength": repr(options.strength),
    }
    if options.prompt is not None:
        metadata["lofa_prompt"] = options.prompt
    lora = replace(prediction.lora.scaled(options.strength), metadata=metadata)
    save_lora(lora, options.out)
    written = [options.out, *_write_responses(options, prediction, base)]
    output = Console(soft_wrap=True, highlight=False)
    short = prediction.responses.short_of_memory
    output.print(
        f"{match(lora, base.model).summary()} ({base.model.name}), rank {lora.rank}, "
        f"predicted in {prediction.seconds:.2f} s on {device}"
        + (f", {at_a_time(short)} because memory was short" if short else ""),
        markup=False,
    )
    for path in written:
        output.print(f"wrote {path}", markup=False)


def _convert(options: argparse.Namespace) -> None:
    check_outputs([(options.out, ".safetensors")], [options.stage1, options.stage2])
    hypernetwork = load_released(options.stage1, options.stage2, dtype=None)
    save_hypernetwork(
        hypernetwork, options.out, dtype=torch.int8 if options.int8 else None,
        notes=f"converted from {options.stage1.name} and {options.stage2.name}",
    )  # fmt: skip
    output = Console(soft_wrap=True, highlight=False)
    layers = len(hypernetwork.base.layers)
    output.print(
        f"predicts LoRAs of rank {hypernetwork.config.rank} for the {layers} target layers of "
        f"{hypernetwork.base.name}",
        markup=False,
    )
    output.print(f"wrote {options.out}", markup=False)


def _write_responses(options: argparse.Namespace, prediction: Prediction, base: BaseWeights) -> list[Path]:
    """Write what --response-out and --heatmap ask for; the files written."""
    written = []
    if options.response_out:
        write_safetensors(dict(prediction.responses), options.response_out, {"lofa_version": __version__})
        written.append(options.response_out)
    if options.heatmap:
        layers = base.model.layers
        picture = render(
            prediction.responses,
            columns=(layer.kind for layer in layers),
            rows=(layer.depth for layer in layers),
        )
        with whole_file(options.heatmap) as unfinished:
            Image.fromarray(picture).save(unfinished, format="PNG")
        written.append(options.heatmap)
    return written


def _inspect(options: argparse.Namespace) -> None:
    description = inspect(options.file)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text.assemble((str(options.file), "bold"), f" is {description.kind}."))
    if not console.is_terminal:  # a line each, for whoever greps
        width = max(len(name) for name, _ in description.facts) + 2
        for name, words in description.facts:
            console.print(f"{name:<{width}}{words}", markup=False)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in description.facts:
        table.add_row(Text(name), Text(words))
    console.print(table)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 .. 2^64 - 1")
    return seed


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
