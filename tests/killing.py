"""A command of training/train.py, killed with SIGKILL at random moments and started again until it ends.

Every start is a process of its own, forked from one that has only imported what all of them need: a start
then takes a tenth of a second instead of ten, and thirty of them can be tried.
"""

import hashlib
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORKED = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
# Of a run's files, what holds times, or says what was there when it was started last.
NOT_COMPARED = ("tensorboard", "random_states_0.pkl", "data_report.json")
SAID = "said.txt"


@dataclass(frozen=True)
class Tried:
    """What became of a command that was killed."""

    kills: int
    ends: int  # how often it came to its end, each time from nothing
    moments: tuple[float, ...]  # seconds from a start to its kill


def run_command(arguments: list[str], said: Path) -> None:
    """What a process does: the command line, in this place."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    from training import train

    sys.argv = ["train.py", *arguments]
    sys.exit(train.main())


class Command:
    """`train.py <part> --config <config> out=...` over copies of a folder that the parts before have made."""

    def __init__(self, part: str, config: Path, before: Path, room: Path):
        self.part, self.config, self.before, self.room = part, config, before, room
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["training.loop", "training.train"])

    def fresh(self, name: str) -> Path:
        """A copy to run in."""
        folder = self.room / name / "run"
        shutil.copytree(self.before, folder)
        return folder

    def start(self, folder: Path, said: Path | None = None) -> multiprocessing.process.BaseProcess:
        """Start it; what it says goes to `said`, else to a file beside the folder."""
        arguments = [self.part, "--config", str(self.config), f'out="{folder.as_posix()}"']
        process = self._context.Process(target=run_command, args=(arguments, said or folder.parent / SAID))
        process.start()
        return process

    def exit_code(self, folder: Path, said: Path) -> int:
        """Run it to its end, whatever that is."""
        process = self.start(folder, said)
        process.join()
        return process.exitcode

    def to_its_end(self, folder: Path) -> float:
        """Run it undisturbed; the seconds it took."""
        started = time.monotonic()
        said = folder.parent / SAID
        assert self.exit_code(folder, said) == 0, said.read_text()[-3000:]
        return time.monotonic() - started

    def killed(self, kills: int, seed: int, check) -> Tried:
        """Kill it `kills` times and let it end each time it can; `check` is given the folder of every end."""
        seconds = self.to_its_end(self.fresh("timed"))
        rng, moments, ends = np.random.default_rng(seed), [], 0
        while len(moments) < kills:
            folder, ended = self.fresh(f"end-{ends}"), False
            while not ended:
                moment = float(rng.uniform(0, seconds)) if len(moments) < kills else None
                process = self.start(folder)
                process.join(moment)
                ended = not process.is_alive()
                if not ended:
                    process.kill()
                    process.join()
                    moments.append(round(moment, 3))
            assert process.exitcode == 0, (folder.parent / SAID).read_text()[-3000:]
            check(folder)
            ends += 1
            shutil.rmtree(folder.parent)
        return Tried(len(moments), ends, tuple(moments))


def contents(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file that a run left, but those of `NOT_COMPARED`. A manifest's lines count
    in any order.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or any(part in NOT_COMPARED for part in path.relative_to(folder).parts):
            continue
        content = path.read_bytes()
        if path.name == "manifest.jsonl":
            content = b"".join(sorted(content.splitlines(keepends=True)))
        found[name] = hashlib.sha256(content).hexdigest()
    return found
