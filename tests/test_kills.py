"""kill -9 at random moments of every command that trains: the end is the undisturbed run's."""

import json
import logging
from pathlib import Path

import pytest
from killing import FORKED, Command, contents
from test_cache import write_dataset

pytestmark = pytest.mark.skipif(not FORKED, reason="this system cannot fork processes")

log = logging.getLogger(__name__)
CONFIG = """
base = "miniature"
out = "run"
[data]
folder = {folder}
coarse_prompt = "a person is moving"
[lora]
rank = 2
steps = 4
batch = 1
tasks_at_once = 2
[network]
width = 16
heads = 2
blocks = 2
mlp_ratio = 1
pooling_queries = 2
feature_blocks = [1]
[stage1]
layers = 4
{steps}
[stage2]
clips = 1
with_lora = 0.4
{steps}
[end_to_end]
clips = 1
{steps}
[text_to_lora]
clips = 1
width = 16
blocks = 1
{steps}
[lora_vae]
latent = 8
layer_width = 4
width = 16
{steps}
[lora_diffusion]
width = 16
blocks = 1
pooling_queries = 2
sampling_steps = 2
{steps}
"""
STEPS = "steps = 24\ntasks = 2\nwarm_up = 2\ncheckpoint_every = 2\nvalidate_every = 12"
# A command -> those that come before it, and the folders of the losses it writes.
COMMANDS = {
    "cache": ((), ()),
    "lora-dataset": (("cache",), ()),
    "stage1": (("cache", "lora-dataset"), ("stage1",)),
    "stage2": (("cache", "lora-dataset", "stage1"), ("stage2",)),
    "end-to-end": (("cache",), ("end_to_end",)),
    "text-to-lora": (("cache", "lora-dataset"), ("text_to_lora",)),
    "lora-diffusion": (("cache", "lora-dataset"), ("lora_vae", "lora_diffusion")),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kills")
    write_dataset(root / "data")
    path = root / "config.toml"
    path.write_text(CONFIG.format(folder=json.dumps(str(root / "data")), steps=STEPS))
    return path


def check_kills(command: str, kills: int, config: Path, room: Path) -> None:
    before, (needed, stages) = room / "before", COMMANDS[command]
    before.mkdir()
    for part in needed:
        Command(part, config, before, room).to_its_end(before)
    tried = Command(command, config, before, room)
    whole = tried.fresh("whole")
    tried.to_its_end(whole)
    wanted = contents(whole)
    assert set(wanted) > set(contents(before))

    def check(folder: Path) -> None:
        assert contents(folder) == wanted
        for stage in stages:
            lines = (folder / stage / "losses.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(1, 25))
        for manifest in folder.glob("*/manifest.jsonl"):
            tasks = [json.loads(line)["task"] for line in manifest.read_text().splitlines()]
            assert tasks and len(set(tasks)) == len(tasks)

    found = tried.killed(kills, seed=len(command), check=check)
    log.info("%s: %s", command, found)
    assert found.kills == kills and found.ends >= 1


@pytest.mark.parametrize("command", ["lora-dataset", "stage2"])
def test_a_few_kills_change_nothing(config, tmp_path, command):
    check_kills(command, 3, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_thirty_kills_change_nothing(config, tmp_path, command):
    check_kills(command, 30, config, tmp_path)
