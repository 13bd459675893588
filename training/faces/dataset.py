"""The world's people as a folder dataset: `python -m training.faces.dataset [--out FOLDER]`.

A task is a person: their traits in words, reference pictures that say who it is, and other pictures of theirs
to learn from. What trains on this folder is what trains on anybody's (docs/DATA.md).
"""

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from . import captions, world
from .make import HELD_OUT, SEED
from .portraits import draw_portraits

PEOPLE, EACH = 1536, 8
JUDGED, EACH_JUDGED = 24, 12  # held-out people; what their own LoRAs learn from
REFERENCES = 3


def person_id(identity: world.Identity) -> str:
    """A task's id: the person's place among all."""
    return f"person-{_places()[identity.indices()]:05d}"


def person(task_id: str) -> world.Identity:
    """Whose task it is."""
    return _everyone()[int(task_id.removeprefix("person-"))]


@cache
def _everyone() -> list[world.Identity]:
    return world.all_identities()


@cache
def _places() -> dict[tuple[int, ...], int]:
    return {identity.indices(): place for place, identity in enumerate(_everyone())}


def write_dataset(out: Path, people: int, judged: int, seed: int = SEED) -> None:
    """Write tasks.jsonl and its pictures; held-out people are among those that the base never saw."""
    training, held_out = world.split_identities(HELD_OUT, SEED)
    picks = np.random.default_rng([seed, 6]).permutation(len(training))[:people]
    lines = []
    for split, chosen, each in (
        ("training", [training[pick] for pick in picks], EACH),
        ("held_out", held_out[:judged], EACH_JUDGED),
    ):
        rng = np.random.default_rng([seed, 7, each])
        for number, identity in enumerate(chosen):
            drawn = draw_portraits([identity], REFERENCES + each, int(rng.integers(2**31)))
            folder = out / person_id(identity)
            folder.mkdir(parents=True, exist_ok=True)
            files = [f"{folder.name}/{row:02d}.png" for row in range(len(drawn))]
            for file, pixels in zip(files, drawn.pixels.numpy(), strict=True):
                Image.fromarray(pixels).save(out / file)
            line = {
                "id": folder.name,
                "prompt": captions.fine_caption(identity, None, np.random.default_rng([seed, 8, number])),
                "coarse_prompt": captions.COARSE,
                "split": split,
                "identity": files[:REFERENCES],
                "clips": [{"file": file} for file in files[REFERENCES:]],
            }
            lines.append(json.dumps(line) + "\n")
    (out / "tasks.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/faces_data"))
    parser.add_argument("--people", type=int, default=PEOPLE, help="to train on")
    parser.add_argument("--judged", type=int, default=JUDGED, help="held out")
    chosen = parser.parse_args()
    write_dataset(chosen.out, chosen.people, chosen.judged)


if __name__ == "__main__":
    main()
