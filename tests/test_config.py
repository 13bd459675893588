"""The training configuration: the shipped file, and what is refused in a user's own."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from lofa_core import miniature
from lofa_core.descriptions import HypernetworkConfig
from training import full_size, train
from training.config import EvaluationConfig, LoRAConfig, Stage1Config, TrainingConfig, load_config

SHIPPED = Path(__file__).parents[1] / "training" / "configs" / "miniature.toml"
LEAST = 'base = "miniature"\nout = "runs/x"\n'


def load(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def tables():
    """(table name or "", its dataclass) of the whole configuration."""
    yield "", TrainingConfig
    yield from (
        (f.name, f.type) for f in dataclasses.fields(TrainingConfig) if dataclasses.is_dataclass(f.type)
    )


def test_the_shipped_configuration_loads_into_frozen_dataclasses():
    config = load_config(SHIPPED)
    assert config.base == "miniature" and isinstance(config.lora, LoRAConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora.rank = 8


def test_the_shipped_configuration_writes_out_every_key():
    every = {
        (table, field.name)
        for table, kind in tables()
        for field in dataclasses.fields(kind)
        if not dataclasses.is_dataclass(field.type)
    }
    assert {(table, key) for table, key, _ in assignments()} == every


def assignments():
    """(table, key, line) of the shipped file."""
    table = ""
    for line in SHIPPED.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = line.split("]")[0].strip("[")
        elif found := re.match(r"(\w+) = ", line):
            yield table, found[1], line


@pytest.mark.parametrize("path", sorted(SHIPPED.parent.glob("wan_text*.toml")), ids=lambda path: path.stem)
def test_the_full_size_configurations_have_the_published_architecture(path):
    config = load_config(path)
    network = HypernetworkConfig(rank=config.lora.rank, **dataclasses.asdict(config.network))
    assert network == full_size.RELEASED
    assert (config.data.frames, config.data.height, config.data.width) == (81, 480, 832)
    assert (config.lora.rank, config.lora.steps, config.lora.batch, config.lora.learning_rate) == (
        32,
        1000,
        4,
        1e-4,
    )
    commented = [
        line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"#|\[|\w+ = .*#", line)
    ]
    assert len(commented) > 20


def test_the_papers_numbers():
    config = load_config(SHIPPED.with_name("wan_text.toml"))
    stages = config.stage1, config.stage2
    assert [(s.steps, s.learning_rate, s.tasks, s.warm_up) for s in stages] == [
        (4000, 1e-4, 4, 1000), (7000, 4e-5, 4, 1000),
    ]  # fmt: skip
    assert config.stage2.reconstruction == "factors"
    assert (config.stage2.reconstruction_weight, config.stage2.diffusion_weight) == (5.0, 1.0)


def test_what_is_left_out_takes_its_default(tmp_path):
    assert load(tmp_path, LEAST) == TrainingConfig("miniature", "runs/x")
    config = load(tmp_path, LEAST + "[stage1]\nsteps = 3\n")
    assert config.stage1 == Stage1Config(steps=3) and config.evaluation == EvaluationConfig()


def test_whole_numbers_stand_for_floats_and_lists_become_tuples(tmp_path):
    config = load(tmp_path, LEAST + "[lora]\nlearning_rate = 1\n[network]\nfeature_blocks = [1]\n")
    assert config.lora.learning_rate == 1.0 and isinstance(config.lora.learning_rate, float)
    assert config.network.feature_blocks == (1,)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LEAST + "sed = 1\n", "unknown key 'sed'. Known here: base, out, stored_as, data"),
        (LEAST + "[lora]\nrnak = 4\n", "[lora]: unknown key 'rnak'. Did you mean 'rank'?"),
        (LEAST + "[lora]\nxyz = 4\n", "[lora]: unknown key 'xyz'. Known here: rank"),
        (LEAST + "[stage3]\nsteps = 1\n", "unknown key 'stage3'. Did you mean 'stage"),
        (LEAST + '[stage1]\noptimiser = "sgd"\n', "optimiser must be one of 'muon', 'adamw', not 'sgd'"),
        (LEAST + "[stage1]\nsteps = 0\n", "[stage1]: steps = 0: expected 1 or more"),
        (LEAST + "[stage2]\ntasks = 6\naccumulate = 4\n", "accumulate = 4 does not divide tasks = 6"),
        (LEAST + '[stage2]\nreconstruction = "l3"\n', "reconstruction = 'l3': expected one of factors"),
        (LEAST + "lora = 4\n", "[lora] must be a table, not 4"),
        (LEAST + '[lora]\nrank = "4"\n', "[lora]: rank must be int, not '4'"),
        (LEAST + "[lora]\nrank = 4.0\n", "[lora]: rank must be int, not 4.0"),
        (LEAST + "[lora]\nrank = true\n", "[lora]: rank must be int, not True"),
        (LEAST + "[lora]\nlearning_rate = true\n", "[lora]: learning_rate must be float, not True"),
        (LEAST + f"[lora]\nlearning_rate = {9 * '9'}{400 * '0'}\n", "[lora]: learning_rate must be float"),
        (LEAST + '[lora]\nlearning_rate = "fast"\n', "[lora]: learning_rate must be float, not 'fast'"),
        (LEAST + "[network]\nfeature_blocks = 2\n", "[network]: feature_blocks must be a list, not 2"),
        (LEAST + "[network]\nfeature_blocks = [0, 1.5]\n", "[network]: feature_blocks must be int, not 1.5"),
        ('base = 3\nout = "x"\n', "base must be str, not 3"),
        ('base = "miniature"\n', "missing out"),
        ('out = "x"\n', "missing base"),
        ("", "missing base, out"),
        ("base = \n", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_table(tmp_path, text, named):
    with pytest.raises(ValueError) as error:
        load(tmp_path, text)
    assert named in str(error.value) and "run.toml" in str(error.value)


def test_the_command_lines_overrides_come_last(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(LEAST + "[stage1]\nsteps = 3\nseed = 4\n")
    overrides = [
        "stage1.steps=7",
        "out=runs/other",
        "stage2.reconstruction=delta",
        "network.feature_blocks=[1]",
    ]
    config = load_config(path, overrides)
    assert config.stage1 == Stage1Config(steps=7, seed=4) and config.out == "runs/other"
    assert config.stage2.reconstruction == "delta" and config.network.feature_blocks == (1,)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stage1.stps=7", r"unknown key 'stps'\. Did you mean 'steps'"),
        ("stage1.steps=many", "steps must be int, not 'many'"),
        ("stage1.steps", "expected section.key=value"),
        ("a.b.c=1", "expected section.key=value"),
        ("out.x=1", "out is a value, not a section"),
    ],
)
def test_an_override_that_is_wrong_is_named(tmp_path, override, named):
    path = tmp_path / "run.toml"
    path.write_text(LEAST)
    with pytest.raises(ValueError, match=named):
        load_config(path, [override])


@pytest.mark.parametrize("text", [None, LEAST + "[lora]\nrnak = 4\n", 'base = "wan"\nout = "{out}"\n'])
def test_the_command_line_says_what_is_wrong_and_returns_two(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "run.toml"
    if text is not None:
        path.write_text(text.replace("{out}", (tmp_path / "out").as_posix()))
    monkeypatch.setattr(sys, "argv", ["train.py", "lora-dataset", "--config", str(path)])
    assert train.main() == 2
    said = capsys.readouterr()
    wanted = (
        "run.toml" if text is None else "[lora]: unknown key 'rnak'" if "rnak" in text else 'base = "wan"'
    )
    assert wanted in said.err and "Traceback" not in said.err and said.out == ""


def test_the_shipped_configuration_is_that_of_the_shipped_network():
    made = json.loads(miniature.FIGURES.read_text())["hypernetwork"]["config"]
    now = json.loads(json.dumps(dataclasses.asdict(load_config(SHIPPED))))
    for section in ("data", "lora", "network", "stage1", "stage2"):  # keys that came later had no other value
        now_there = {key: now[section][key] for key in made[section]}
        assert now_there | {"cache": ""} == made[section] | {"cache": ""}, section
