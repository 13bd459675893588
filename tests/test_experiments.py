"""Experiments: the plan is read and checked, each is trained and judged once, seeds come together."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import generator

from lofa_core import miniature
from training import experiments as module
from training.experiments import Plan, Seed, figures_of, keep, slug
from training.miniature import world
from training.miniature.latents import LatentClips

CONFIG = """
base = "miniature"
out = "unused"
[network]
width = 16
heads = 2
blocks = 2
mlp_ratio = 1
pooling_queries = 2
feature_blocks = [1]
[data]
clips_per_task = 1
lora_tasks = 32
[stage1]
steps = 2
tasks = 2
layers = 4
[stage2]
steps = 2
tasks = 2
clips = 1
warm_up = 1
learning_rate = 0.02
[lora_vae]
steps = 2
tasks = 2
latent = 8
layer_width = 4
width = 8
[lora_diffusion]
steps = 2
tasks = 2
width = 8
blocks = 1
sampling_steps = 2
[text_to_lora]
steps = 2
tasks = 2
clips = 1
warm_up = 1
learning_rate = 0.02
width = 16
"""
PLAN = """
config = "small.toml"
out = "{folder}/runs"
results = "{folder}/results"
set = ['data.cache="{folder}/cache"', "stage1.validate_every=0", "lora_vae.validate_every=0"]
[experiment."base"]
prompts = ["coarse", "fine"]
[experiment."mean LoRA"]
[experiment."mean LoRA, elsewhere"]
bases = ["{folder}/elsewhere"]
[experiment."LoFA"]
parts = ["stage1", "stage2"]
[experiment."no features"]
parts = ["stage2"]
stage1_of = "LoFA"
set = ["network.feature_blocks=[]"]
[experiment."MLP"]
parts = ["text-to-lora"]
[experiment."drawn"]
parts = ["lora-diffusion"]
[experiment."own"]
parts = ["lora-dataset"]
set = ["lora.steps=2", "lora.batch=1", "data.lora_tasks=1", 'data.loras="{folder}/loras"']
[experiment."maps"]
parts = ["stage1"]
set = ["data.lora_tasks=16"]
[experiment."maps of two trainings"]
parts = ["stage1"]
set = ["data.lora_tasks=16"]
again = ["ow*"]
"""


class FakeJudge:
    """Says of a method how large its LoRAs are."""

    def __init__(self, data, tasks, settings, evaluator):
        self.tasks, self.settings = tasks, settings
        rng = np.random.default_rng(settings.seed)
        self.sentences = [data.reserved_sentence(task, rng) for task in tasks]

    def measure(self, method):
        size = 0.0 if method.factors is None else 1e6 * float(method.factors.deltas()[0].abs().mean())
        return {"joint": size, "prompt": float(method.prompt == "fine"), "seed": self.settings.seed}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "small.toml").write_text(CONFIG)
    (folder / "plan.toml").write_text(PLAN.format(folder=folder))
    actions, _ = world.split_actions(32, 0)
    labels = torch.tensor([action.indices() for action in actions], dtype=torch.uint8)
    noise = torch.randn(len(actions), 16, 5, 8, 8, generator=generator(0)).half()
    (folder / "cache").mkdir()
    (folder / "elsewhere").symlink_to(miniature.FOLDER)
    looks = torch.zeros(len(actions), 3, dtype=torch.uint8)
    LatentClips(noise, labels, looks).save(folder / "cache" / "latents.pt")
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """All with one seed, three with another, then all again: by then nothing is left to do."""
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "Judge", FakeJudge)
    patch.setattr(module.evaluator, "load", lambda: None)
    patch.chdir(folder)
    said = []
    for seed, only in (("0", []), ("1", ["--only", "base", "MLP", "no features", "own"]), ("0", [])):
        arguments = ["experiments", "--config", str(folder / "plan.toml"), "--seeds", seed, *only]
        patch.setattr("sys.argv", arguments)
        stream = io.StringIO()
        patch.setattr(module, "Console", lambda stream=stream, **_: Console(file=stream, width=200))
        assert module.main() == 0
        said.append(stream.getvalue())
    patch.undo()
    files = {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}
    return files, said


def test_every_experiment_has_the_figures_of_its_seeds(finished):
    files, _ = finished
    maps = {"maps", "maps_of_two_trainings"}
    known = {"base", "mean_lora", "mean_lora_elsewhere", "lofa", "no_features", "mlp", "drawn", "own"}
    assert set(files) == known | maps
    seeds = {name: list(found["seeds"]) for name, found in files.items()}
    assert seeds == {
        name: ["0", "1"] if name in ("base", "mlp", "no_features", "own") else ["0"] for name in files
    }
    assert files["base"]["seeds"]["1"]["rows"]["coarse"] == {"joint": 0.0, "prompt": 0.0, "seed": 1235}
    rows = {name: found["seeds"]["0"]["rows"] for name, found in files.items()}
    assert rows["base"]["fine"]["prompt"] == 1.0 and set(rows["mean_lora"]) == {"coarse"}
    assert [rows.pop(name) for name in maps] == [{}, {}]
    sizes = {name: row["coarse"]["joint"] for name, row in rows.items() if name != "mean_lora_elsewhere"}
    assert sizes["mean_lora"] > 0 and len(set(sizes.values())) == 7  # each has LoRAs of its own


def test_what_only_a_trained_network_has_is_there(finished):
    files, _ = finished
    lofa, mlp, base = (files[name]["seeds"]["0"] for name in ("lofa", "mlp", "base"))
    assert lofa["training_seconds"] > 0 and lofa["seconds"] > 0 and lofa["parameters"] > mlp["parameters"] > 0
    assert 0 < lofa["response"]["stage1_cosine"] < 1 and "response" not in mlp
    assert set(base) == {"rows", "machine"}
    spread = files["drawn"]["seeds"]["0"]["spread"]
    assert spread["between_seeds"] > 0 and spread["between_tasks"] > 0


def test_behind_the_comma_stand_the_bases_that_a_method_is_judged_on_as_well(finished):
    here, elsewhere = (finished[0][name]["seeds"]["0"] for name in ("mean_lora", "mean_lora_elsewhere"))
    assert "bases" not in here and elsewhere["rows"] == here["rows"]
    assert elsewhere["bases"] == {
        "elsewhere": here["rows"]["coarse"]
    }  # the same LoRAs, on a link to the base


def test_loras_that_seeds_share_are_trained_and_timed_once(folder, finished):
    first, second = (finished[0]["own"]["seeds"][seed] for seed in "01")
    assert first["seconds"] > 0 and "seconds" not in second
    assert first["rows"]["coarse"]["joint"] == second["rows"]["coarse"]["joint"] > 0
    assert len(list((folder / "loras/loras_held_out").glob("*.safetensors"))) == 32


def test_stage_one_alone_is_judged_by_its_maps(finished):
    maps = finished[0]["maps"]["seeds"]["0"]
    assert 0 < maps["response"]["stage1_cosine"] < 1 and maps["loras"] == 16
    assert not [name for name in maps["response"] if name.startswith("stage2")]


def test_stage_one_is_compared_with_how_often_entries_respond_in_several_trainings(finished):
    once, both = (finished[0][name]["seeds"]["0"]["response"] for name in ("maps", "maps_of_two_trainings"))
    assert both.pop("trainings") == 2 and both.pop("stage1_often_task_cosine") != both["stage1_task_cosine"]
    assert both == once


def test_anothers_stage_one_is_trained_where_it_is_not_there(folder, finished):
    assert (folder / "runs/lofa-1/stage1.safetensors").exists()  # for "no features"; LoFA itself was not run
    assert not (folder / "runs/lofa-1/hypernetwork.safetensors").exists()


def test_an_experiment_takes_anothers_stage_one_under_its_own_design(folder, finished):
    own, other = (
        module.load_hypernetwork(folder / "runs" / name / "stage1.safetensors")
        for name in ("lofa-0", "no_features-0")
    )
    assert (own.config.feature_blocks, other.config.feature_blocks) == ((1,), ())
    assert all(
        torch.equal(value, other.stage1.state_dict()[key]) for key, value in own.stage1.state_dict().items()
    )
    assert not (folder / "runs" / "no_features-0" / "stage1" / "losses.jsonl").exists()


def test_what_is_done_is_not_done_again_unless_it_is_changed(folder, finished):
    _, (first, second, third) = finished
    assert "LoFA, seed 0" in first and "MLP, seed 1" in second and third == ""
    results = folder / "results"
    described = Plan.load(folder / "plan.toml").described("no features")
    assert figures_of(results, described, 0) and not figures_of(results, described, 7)
    changes = ("set", ["stage2.steps=3"]), ("common", ["lora.rank=2"]), ("stage1_of", ""), ("name", "another")
    for key, other in changes:
        assert described[key] != other and not figures_of(results, described | {key: other}, 0)


def test_judged_again_a_run_has_new_figures_and_keeps_what_its_training_told(folder, finished, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module.evaluator, "load", lambda: None)
    monkeypatch.setattr(module, "Judge", FakeJudge)
    measure = FakeJudge.measure
    monkeypatch.setattr(FakeJudge, "measure", lambda self, method: measure(self, method) | {"more": 1.0})
    results = folder / "again"
    shutil.copytree(folder / "results", results)
    text = (folder / "plan.toml").read_text().replace("/results", "/again")
    (folder / "again.toml").write_text(text)
    described = Plan.load(folder / "again.toml").described("LoFA")
    before = figures_of(results, described, 0)
    steps = folder / "runs" / "lofa-0" / "stage2" / "losses.jsonl"
    trained = steps.read_bytes()
    arguments = ["experiments", "--config", str(folder / "again.toml"), "--only", "LoFA", "--again"]
    monkeypatch.setattr("sys.argv", arguments)
    assert module.main() == 0
    after = figures_of(results, described, 0)
    assert after["training_seconds"] == before["training_seconds"]
    assert after["rows"]["coarse"] == before["rows"]["coarse"] | {"more": 1.0}
    assert steps.read_bytes() == trained


def test_seeds_of_an_experiment_come_together_in_their_order(tmp_path):
    described = {"name": "A name, of two", "set": ["a=1"], "common": ["b=1"]}
    keep(tmp_path / "new", described | {"common": ["b=0"]}, 7, {"rows": {}})  # of other settings
    for seed in (10, 2):
        keep(tmp_path / "new", described, seed, {"rows": {"coarse": {"joint": seed / 3}}})
    outdated, path = sorted((tmp_path / "new").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert list(json.loads(outdated.read_text())["seeds"]) == ["7"] and outdated.suffix == ".outdated"
    assert path.name == "a_name_of_two.json" == f"{slug('A name, of two')}.json"
    found = json.loads(path.read_text())
    assert list(found["seeds"]) == ["2", "10"] and found["set"] == ["a=1"]
    assert found["seeds"]["10"]["rows"]["coarse"]["joint"] == 3.3333


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("a = [", "not valid TOML"),
        ('config = "a"\nsets = []', "unknown key 'sets'. Known here: config"),
        ('out = "a"\nresults = "b"', "config is missing"),
        (
            '[experiment."A"]\nparts = ["stage3"]',
            r"parts = \['stage3'\]: expected some of lora-dataset, stage1",
        ),
        ('[experiment."A"]\nstage1_of = "B"', "stage1_of = 'B' is no experiment above it"),
        ('[experiment."A"]\nagain = ["B"]', "again = 'B' is no experiment above it"),
        ('[experiment."A"]\nagain = ["A*"]', r"again = 'A\*' is no experiment above it"),
        ('[experiment."A"]\nprompt = ["fine"]', "unknown key 'prompt'. Did you mean 'prompts'"),
    ],
)
def test_a_plan_that_is_wrong_is_named(tmp_path, written, said):
    path = tmp_path / "plan.toml"
    path.write_text(written)
    with pytest.raises(ValueError, match=said) as error:
        Plan.load(path)
    assert "plan.toml" in str(error.value)


def test_a_pattern_of_again_stands_for_the_experiments_above_it(tmp_path):
    path = tmp_path / "plan.toml"
    names = ["own, again", "own", "own, again 2", "maps", "own, again 3"]
    sections = [f'[experiment."{name}"]' + '\nagain = ["own, *", "own"]' * (name == "maps") for name in names]
    path.write_text("\n".join(['config = "a"', 'out = "b"', 'results = "c"', *sections]))
    assert Plan.load(path).experiments["maps"].again == ("own, again", "own", "own, again 2")


def test_the_command_line_says_what_is_wrong(folder, monkeypatch, capsys):
    arguments = ["experiments", "--config", str(folder / "plan.toml"), "--only", "LoFFA"]
    monkeypatch.setattr("sys.argv", arguments)
    assert module.main() == 2
    told = capsys.readouterr().err.replace("\n", " ")
    assert "expected some of base; mean LoRA; mean LoRA, elsewhere; LoFA" in told


def test_a_name_that_needs_training_and_says_no_parts_is_refused(folder):
    plan = Plan.load(folder / "plan.toml")
    seed = Seed(plan, 0, Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="'typo'.*has no parts"):
        seed._untrained("typo", *[type("Known", (), {"indices": lambda self: None})()] * 2)


def test_the_shipped_plan_is_whole():
    from pathlib import Path

    from training.config import load_config
    from training.result_tables import TABLES

    plan = Plan.load(Path(module.__file__).parent / "configs" / "experiments.toml")
    for experiment in plan.experiments.values():
        load_config(Path(plan.config), [*plan.set, *experiment.set])
    named = {line.experiment: line.prompt for table in TABLES for line in table.lines}
    missing = set(named) - set(plan.experiments)
    # Tables may name sizes that nobody has run; each of those is a size of something that is there.
    assert all(name.rpartition(", ")[0] in ("without response", "Text-to-LoRA MLP") for name in missing)
    families = {name for name in plan.experiments if plan.experiments[name].bases}
    maps = {name for name in plan.experiments if plan.experiments[name].parts == ("stage1",)}
    again = {name for experiment in plan.experiments.values() for name in experiment.again} - set(named)
    assert set(plan.experiments) - set(named) == families | maps | again and len(families) == 8


def test_the_figures_that_are_kept_belong_to_the_shipped_plan():
    from pathlib import Path

    root = Path(module.__file__).parents[1]
    plan = Plan.load(root / "training" / "configs" / "experiments.toml")
    kept = sorted((root / plan.results).glob("*.json"))
    assert len(kept) > 50
    for path in kept:
        name = json.loads(path.read_text())["name"]
        assert figures_of(path.parent, plan.described(name), 0), f"{path.name}: of another plan"
