"""Identity on the second miniature: a whole small run on its folder dataset, judged."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from folder_runs import SMALL
from PIL import Image
from rich.console import Console

from lofa_core.checkpoint import load_hypernetwork
from training.config import DataConfig, LoRAConfig, Stage1Config, Stage2Config, TrainingConfig, load_config
from training.faces import identity, make
from training.faces.dataset import write_dataset
from training.loop import Run

CONFIG = Path(__file__).parents[1] / "training/configs/faces_identity.toml"
STEPS = {"steps": 2, "tasks": 3, "validate_every": 2, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of every stage on three people, two held out."""
    root = tmp_path_factory.mktemp("identity")
    write_dataset(root / "data", people=3, judged=2)
    data = DataConfig(("identity",), folder=str(root / "data"), frames=1, lora_tasks=3)
    config = TrainingConfig(
        str(make.DEFAULT), str(root / "run"), stored_as="int8", data=data, network=SMALL,
        lora=LoRAConfig(rank=2, steps=2, batch=1), stage1=Stage1Config(layers=4, **STEPS),
        stage2=Stage2Config(clips=1, with_lora=0.4, **STEPS),
    )  # fmt: skip
    run = Run(config, Console(file=io.StringIO(), width=200))
    run.cache(), run.lora_dataset(), run.stage1(), run.stage2()
    return run


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    """(figures, the picture's file)."""
    picture = tmp_path_factory.mktemp("sheet") / "people.png"
    network = load_hypernetwork(run.folder / "hypernetwork.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "EACH", 2)
        patch.setattr(identity, "SHOWN", 1)
        patch.setattr(identity, "sample", functools.partial(identity.sample, steps=3))
        return identity.evaluate(run.config, network, run.console, picture, end_to_end=network), picture


def test_every_method_draws_the_same_people_and_is_read(found):
    figures, _ = found
    assert figures["people"] == figures["each"] == 2
    assert list(figures["rows"]) == [
        "base", "base, the person in words", "mean LoRA", "nearest LoRA", "ridge regression", "LoFA",
        "end to end", "per-person LoRA",
    ]  # fmt: skip
    for row in figures["rows"].values():
        for place in (row, row["scenes"]):
            assert -1.0 <= place["identity_similarity"] <= 1.0 and place["diversity"] > 0
        assert 0.0 <= row["scenes"]["attributes_right"] <= 1.0
        assert row["diversity_real"] == figures["rows"]["base"]["diversity_real"]
    assert figures["rows"]["end to end"] == figures["rows"]["LoFA"]  # here the same network
    assert all(seconds > 0 for seconds in figures["seconds"].values())
    assert json.loads(json.dumps(figures)) == figures


def test_loras_are_guided_by_hm_cfg_with_each_weight(found):
    hybrid = found[0]["hybrid"]
    assert [(row["method"], row["w_base"], row["w_subject"]) for row in hybrid] == [
        (name, 3.0, weight)
        for name in ("LoFA", "end to end", "per-person LoRA")
        for weight in (1.5, 3.0, 4.5)
    ]
    for row in hybrid:
        assert -1.0 <= row["identity_similarity"] <= 1.0 and 0.0 <= row["attributes_right"] <= 1.0


@pytest.fixture(scope="module")
def people(run):
    """(Studio of two people, one picture each; their LoRAs, made loud)."""
    data = identity.FolderTasks(run.config.data, run.folder, make.DEFAULT)
    groups = identity.names_by_shape(load_hypernetwork(run.folder / "hypernetwork.safetensors"))
    wanted = identity.LoRAFolder(run.folder / "loras_held_out").load(groups, data.held_out)
    known = [identity.person(task.id) for task in wanted.tasks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "EACH", 1)
        patch.setattr(identity, "sample", functools.partial(identity.sample, steps=2))
        studio = identity.Studio(identity.Base(make.DEFAULT), data.load_denoiser(), known, groups)
        yield studio, wanted.loras.scaled(500.0)


@pytest.mark.parametrize(
    ("weights", "alike", "guidance"),
    [((3.0, 0.0), "base", 3.0), ((1.0, 1.0), "personalised", 1.0)],
)
def test_hm_cfg_has_the_base_and_the_personalised_model_at_its_ends(people, weights, alike, guidance):
    studio, loud = people
    methods = {"base": identity.Method("base", None), "personalised": identity.Method("own", loud)}
    hybrid = identity.HybridGuidance(*weights)
    drawn = studio.draw(methods["personalised"], scenes=True, guidance=hybrid).astype(int)
    for name, method in methods.items():
        away = np.abs(drawn - studio.draw(method, scenes=True, guidance=guidance)).max()
        assert (away <= 1) == (name == alike)  # batches of three round otherwise than batches of two


def test_a_lora_is_injected_for_its_own_person_and_taken_out_again(people):
    studio, loud = people
    base = identity.Method("base", None)
    before = studio.draw(base, scenes=False)
    second = loud.map(lambda factor: factor * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
    changed = studio.draw(identity.Method("second", second), scenes=False)
    after = studio.draw(base, scenes=False)
    assert np.array_equal(before, after) and np.array_equal(before[0], changed[0])
    assert not np.array_equal(before[1], changed[1])


def test_the_picture_shows_the_given_one_and_three_rows(found):
    picture = np.asarray(Image.open(found[1]))
    assert picture.shape[1] == 2 * 2 * 64 and picture.std() > 10  # EACH pictures, twice as large


def test_the_shipped_configuration_is_that_of_this_world():
    config = load_config(CONFIG)
    assert config.data.conditions == ("identity",) and config.base == "training/faces/model"
    assert config.data.coarse_prompt == identity.captions.COARSE
