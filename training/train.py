"""Train and evaluate a LoFA hypernetwork.

    python training/train.py all --config training/configs/miniature.toml
        per-task LoRAs, then Stage I, then Stage II
    python training/train.py {loras,stage1,stage2} --config ...
        one part, from what the run's folder holds
    python training/train.py evaluate --config ...
        held-out figures of the run's hypernetwork, else of the embedded one; the last line is JSON
    python training/train.py ship --config ...
        make the run's hypernetwork, LoRAs and figures the embedded ones
    torchrun --nproc-per-node 2 training/train.py all --config ...
        data parallel, on CPU cores or GPUs

Everything a run makes lies in its `out` folder; the configuration's own comments explain every key.
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["all", "loras", "stage1", "stage2", "evaluate", "ship"])
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
    chosen = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    try:
        config = load_config(chosen.config)
        from training.loop import Run  # after the cheap errors: importing diffusers takes seconds

        run = Run(config, console)
        if chosen.command == "evaluate":
            found = run.evaluate(chosen.hypernetwork, chosen.more)
            if run.process == 0:
                sys.stdout.write(json.dumps(found) + "\n")
            return 0
        parts = ("loras", "stage1", "stage2") if chosen.command == "all" else (chosen.command,)
        for part in parts:
            getattr(run, part)()
    except (ValueError, OSError) as error:
        console.print(Text("error ", "bold red"), Text(str(error)), soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
