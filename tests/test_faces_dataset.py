"""The second miniature's people as a folder dataset: readable, whole, and nobody in both halves."""

import json

import numpy as np
import pytest
from PIL import Image

from training.config import DataConfig
from training.data.task_folder import read_task_folder
from training.faces import captions, make, world
from training.faces.dataset import EACH, EACH_JUDGED, REFERENCES, person, person_id, write_dataset


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    write_dataset(folder, people=3, judged=2)
    return folder


def test_it_is_a_dataset_that_training_reads_without_a_complaint(written):
    config = DataConfig(conditions=("identity",), folder=str(written), frames=1)
    found = read_task_folder(written, config)
    assert not found.problems and [task.split for task in found.tasks] == 3 * ["training"] + 2 * ["held_out"]
    for task in found.tasks:
        assert task.coarse_prompt == captions.COARSE and len(task.identity) == REFERENCES
        assert len(task.clips) == (EACH if task.split == "training" else EACH_JUDGED)
        assert not {clip.file for clip in task.clips} & set(task.identity)


def test_an_id_says_who_it_is_and_the_prompt_says_all_that_words_can(written):
    assert all(person(person_id(identity)) == identity for identity in world.all_identities()[::997])
    for line in (written / "tasks.jsonl").read_text().splitlines():
        task = json.loads(line)
        who = person(task["id"])
        said = [captions.says(task["prompt"], name, getattr(who, name)) for name in world.FACTORS]
        assert all(said)
        assert not any(captions.says(task["prompt"], "place", place) for place in world.ATTRIBUTES["place"])


def test_the_judged_are_people_whom_the_base_never_saw(written):
    tasks = [json.loads(line) for line in (written / "tasks.jsonl").read_text().splitlines()]
    unseen = set(world.split_identities(make.HELD_OUT, make.SEED)[1])
    assert [person(task["id"]) in unseen for task in tasks] == [task["split"] == "held_out" for task in tasks]


def test_a_persons_pictures_differ_and_come_again_alike(written, tmp_path):
    write_dataset(tmp_path, people=3, judged=2)
    first = json.loads((written / "tasks.jsonl").read_text().splitlines()[0])
    files = [*first["identity"], *(clip["file"] for clip in first["clips"])]
    pixels = [np.asarray(Image.open(written / file)) for file in files]
    assert all(picture.shape == (world.SIZE, world.SIZE, 3) for picture in pixels)
    assert len({picture.tobytes() for picture in pixels}) == len(pixels)
    assert all((tmp_path / file).read_bytes() == (written / file).read_bytes() for file in files)
