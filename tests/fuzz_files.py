"""Damage files of every kind at random and read them: `python -m tests.fuzz_files --count 100000`.

Each is read, or refused by one short error that names it, within 5 seconds of computing, and all of them
together within 500 MB more than at the start; no code in them is run. At the first one where that does not
hold it stops, with the seed and the number by which it comes again and what was in the files in --keep.
"""

import argparse
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

from hostile_files import Kind, agrees_with_the_library, kinds, outcome
from injuries import damaged
from rich.console import Console

SECONDS, MEGABYTES = 5.0, 500


def tried(found: list[Kind], folder: Path, seed: int, number: int) -> tuple[str, str]:
    """(a file's name, what became of it). The damaged file is left in the folder where it raises."""
    chance = random.Random(f"{seed} {number}")
    kind = chance.choice(found)
    path = folder / kind.name
    path.write_bytes(damaged(kind.sound, kind.name, chance))
    before, peak = time.process_time(), _peak()
    what = outcome(kind, path)
    assert time.process_time() - before < SECONDS, f"{time.process_time() - before:.1f} s"
    assert _peak() - peak < MEGABYTES, f"{_peak() - peak} MB"
    if path.suffix == ".safetensors":
        agrees_with_the_library(path)
    path.write_bytes(kind.sound)  # others may name it
    return kind.name, what


def _peak() -> int:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--only", default="", help="names of files that hold this")
    chosen = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found = [kind for kind in kinds(place).values() if chosen.only in kind.name]
        for kind in found:
            if outcome(kind, place / kind.name) != "read":
                raise AssertionError(f"{kind.name} is not even read when it is sound")
        start, before = time.perf_counter(), _peak()
        for number in range(chosen.first, chosen.first + chosen.count):
            try:
                counts[tried(found, place, chosen.seed, number)] += 1
            except BaseException:
                console.print(f"--seed {chosen.seed} --first {number} --count 1", style="bold red")
                shutil.copytree(place, chosen.keep / f"{chosen.seed}_{number}", dirs_exist_ok=True)
                raise
            if counts.total() % 10_000 == 0:
                console.print(f"{counts.total()} in {time.perf_counter() - start:.0f} s")
        grown = _peak() - before
    for (kind, what), count in sorted(counts.items()):
        console.print(f"{kind:<30} {what:<8} {count}")
    console.print(f"{counts.total()} files, more memory at the end by {grown} MB")
    return int(grown > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
