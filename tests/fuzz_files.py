"""Damage files of every kind at random and read them: `python -m tests.fuzz_files --count 100000`.

Each is read, or refused by one short error that names it; within 5 seconds, and within 500 MB for all of them
together. What does not hold is kept in --keep, and the seed and number are shown with which it comes again.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import psutil
from hostile_files import Kind, agrees_with_the_library, damaged, kinds, outcome
from rich.console import Console

SECONDS, MEGABYTES = 5.0, 500


def fuzz(found: list[Kind], folder: Path, numbers: range, seed: int) -> tuple[Counter, float]:
    """(what became of how many, the slowest one's seconds of CPU); raises with the file left in `folder`."""
    counts: Counter = Counter()
    slowest = 0.0
    for number in numbers:
        chance = random.Random(f"{seed} {number}")
        kind = chance.choice(found)
        path = folder / kind.name
        path.write_bytes(damaged(kind.sound, kind.name, chance))
        before = time.process_time()
        counts[kind.name, outcome(kind, path)] += 1
        slowest = max(slowest, time.process_time() - before)
        if path.suffix == ".safetensors":
            agrees_with_the_library(path)
        path.write_bytes(kind.sound)  # others may name it
    return counts, slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--only", help="names of files that hold this")
    chosen = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    counts: Counter = Counter()
    failures, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as beside, tempfile.TemporaryDirectory() as place:
        found = [kind for kind in kinds(Path(beside)).values() if (chosen.only or "") in kind.name]
        shutil.copy(Path(beside) / "wave.png", place)  # what tasks.jsonl names
        for kind in found:
            (Path(place) / kind.name).write_bytes(kind.sound)
            if outcome(kind, Path(place) / kind.name) != "read":
                raise AssertionError(f"{kind.name} is not even read when it is sound")
        memory = before = psutil.Process().memory_info().rss
        for number in range(chosen.first, chosen.first + chosen.count):
            try:
                one, seconds = fuzz(found, Path(place), range(number, number + 1), chosen.seed)
            except Exception:
                failures += 1
                chosen.keep.mkdir(parents=True, exist_ok=True)
                for left in Path(place).iterdir():
                    shutil.copy(left, chosen.keep / f"{chosen.seed}_{number}_{left.name}")
                console.print(f"--seed {chosen.seed} --first {number} --count 1", style="bold red")
                console.print(traceback.format_exc(limit=-4), markup=False)
                if failures > 20:
                    return 1
                continue
            counts += one
            slowest = max(slowest, seconds)
            memory = max(memory, psutil.Process().memory_info().rss)
            if number % 10_000 == 9_999:
                console.print(f"{number + 1 - chosen.first} ...")
    for (name, what), count in sorted(counts.items()):
        console.print(f"{name:<30} {what:<8} {count}")
    grown = (memory - before) / 2**20
    console.print(
        f"{sum(counts.values())} files, {failures} failures, slowest {slowest:.2f} s, grown by {grown:.0f} MB"
    )
    return int(failures > 0 or slowest > SECONDS or grown > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
