"""Train and evaluate a LoFA hypernetwork.

    python training/train.py cache --config ...
        latents and text states of your own clips (data.folder), once; data_report.json says what was left out
    python training/train.py lora-dataset --config training/configs/miniature.toml
        one LoRA for each training and held-out task: what the stages learn from
    python training/train.py stage1 --config ...
        the response maps (Stage I), from those LoRAs
    python training/train.py stage2 --config ...
        the LoRAs themselves (Stage II), from Stage I
    python training/train.py end-to-end --config ...
        both stages at once from clips alone, without LoRAs to learn from
    python training/train.py text-to-lora --config ...
        a baseline: an MLP from the condition alone, on the same LoRAs and clips
    python training/train.py lora-diffusion --config ...
        LoRA Diffusion, from the same LoRAs: a second generator, which draws another LoRA for every seed
    python training/train.py all --config ...
        cache (where there is a folder), lora-dataset, stage1 and stage2 in their order
    python training/train.py evaluate --config ...
        held-out figures of the run's hypernetwork, else of the embedded one; the last line is JSON
    python training/train.py ship --config ...
        make the run's hypernetwork, LoRAs and figures the embedded ones
    python training/train.py stage2 --config ... stage2.steps=100 out=runs/short
        any key of the configuration can be set on the command line
    torchrun --nproc-per-node 2 training/train.py all --config ...
        data parallel, on CPU cores or GPUs; the losses are those of one process

Kill a run at any moment and start it again with the same line: it goes on from its last checkpoint.
Everything it makes lies in its `out` folder; the configuration's own comments explain every key.
"""

import sys
from pathlib import Path

if (
    not __package__
):  # run as a file: the repository root in place of this folder, whose modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json

from rich.console import Console
from rich.text import Text

from training.config import load_config

COMMANDS = (
    "cache",
    "lora-dataset",
    "stage1",
    "stage2",
    "end-to-end",
    "text-to-lora",
    "all",
    "evaluate",
    "ship",
    "lora-diffusion",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="in place of what the configuration says"
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="a TOML file, such as training/configs/miniature.toml"
    )
    parser.add_argument(
        "--hypernetwork", type=Path, help="evaluate this file (default: the run's, else the embedded one)"
    )
    parser.add_argument(
        "--more",
        action="store_true",
        help="evaluate: also known wordings, guidance and strength (3 rows more)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="lora-dataset: share the tasks among the workers of a Ray cluster; `local` starts one here",
    )
    chosen = parser.parse_intermixed_args()
    console = Console(stderr=True, highlight=False)
    try:
        config = load_config(chosen.config, chosen.overrides)
        from training.loop import Run  # after the cheap errors: importing diffusers takes seconds

        run = Run(config, console)
        if chosen.command == "evaluate":
            found = run.evaluate(chosen.hypernetwork, chosen.more)
            if run.process == 0:
                sys.stdout.write(json.dumps(found) + "\n")
            return 0
        everything = (*(("cache",) if config.data.folder else ()), "lora-dataset", "stage1", "stage2")
        parts = everything if chosen.command == "all" else (chosen.command,)
        for part in parts:
            if part == "lora-dataset":
                run.lora_dataset(chosen.ray)
            else:
                getattr(run, part.replace("-", "_"))()
    except (ValueError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # A log or a manifest, which is open already: nothing names the file.
            said = f"{config.out}: {error.strerror}. What is there is whole: run the same line again."
        console.print(Text("error ", "bold red"), Text(said), soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
