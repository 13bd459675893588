"""Every command that trains, killed with kill -9 at random moments or on a full disk:
started again, it ends as if nothing had been.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from killing import FORKED, Command, contents
from small_disk import disk, fill
from test_cache import write_dataset

from lofa_core.lora_files import each_tensor

pytestmark = pytest.mark.skipif(not FORKED, reason="this system cannot fork processes")

log = logging.getLogger(__name__)
CONFIG = """
base = "miniature"
out = "run"
[data]
folder = {folder}
coarse_prompt = "a person is moving"
frames = 5
height = 32
width = 32
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


class Prepared:
    """A small dataset and its configuration; the folders that commands start from, each made once."""

    def __init__(self, root: Path):
        self.root, self._made = root, {}
        write_dataset(root / "data")
        self.config = root / "config.toml"
        self.config.write_text(CONFIG.format(folder=json.dumps(str(root / "data")), steps=STEPS))

    def after(self, parts: tuple[str, ...]) -> Path:
        """The run's folder after these commands."""
        if parts not in self._made:
            folder = self.root / "-".join(("after", *parts)) / "run"
            if parts:
                shutil.copytree(self.after(parts[:-1]), folder)
                Command(parts[-1], self.config, folder, self.root).to_its_end(folder)
            else:
                folder.mkdir(parents=True)
            self._made[parts] = folder
        return self._made[parts]

    def command(self, name: str, room: Path) -> tuple[Command, dict[str, str]]:
        """(a command, what it leaves where nothing disturbs it)."""
        parts = COMMANDS[name][0]
        return Command(name, self.config, self.after(parts), room), contents(self.after((*parts, name)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("faults"))


def check_kills(command: str, kills: int, prepared: Prepared, room: Path) -> None:
    tried, wanted = prepared.command(command, room)

    def check(folder: Path) -> None:
        assert contents(folder) == wanted
        for stage in COMMANDS[command][1]:
            lines = (folder / stage / "losses.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(1, 25))
        for manifest in folder.glob("*/manifest.jsonl"):
            tasks = [json.loads(line)["task"] for line in manifest.read_text().splitlines()]
            assert tasks and len(set(tasks)) == len(tasks)

    found = tried.killed(kills, seed=len(command), check=check)
    assert found.kills == kills and found.ends >= 1
    log.info("%s: %s", command, found)


@pytest.mark.parametrize("command", ["lora-dataset", "stage1"])
def test_a_few_kills_change_nothing(prepared, tmp_path, command):
    check_kills(command, 2, prepared, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_thirty_kills_change_nothing(prepared, tmp_path, command):
    check_kills(command, 30, prepared, tmp_path)


def check_full(command: str, shares: tuple[float, ...], prepared: Prepared, room: Path) -> None:
    """A command with that share of the space it takes, then again with enough."""
    tried, wanted = prepared.command(command, room)
    before, whole = (prepared.after(COMMANDS[command][0] + end) for end in ((), (command,)))
    takes = size(whole) - size(before)
    for share in shares:
        with disk(room / f"disk-{share}", 2**26) as place:
            folder, said = place / "run", room / f"said-{share}.txt"
            shutil.copytree(before, folder)
            ballast = fill(place, int(share * takes))
            assert tried.exit_code(folder, said) == 2, said.read_text()[-3000:]
            words = said.read_text()
            # TensorBoard's thread may complain beside it, even within the line.
            (error,) = re.findall(f"error  {re.escape(str(folder))}.*", words)
            assert "No space left" in error or "MB free" in error, words
            for file in folder.rglob("*.safetensors"):
                assert list(each_tensor(file))
            assert not list(folder.rglob("unfinished-*"))
            ballast.unlink()
            assert tried.exit_code(folder, said) == 0, said.read_text()[-3000:]
            assert contents(folder) == wanted
            log.info("%s with %.0f%% of its space: %s", command, 100 * share, error)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_stops_a_stage_and_it_goes_on_when_there_is_room(prepared, tmp_path):
    check_full("stage1", (0.4,), prepared, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_stops_any_command_and_it_goes_on_when_there_is_room(prepared, tmp_path, command):
    check_full(command, (0.0, 0.2, 0.4, 0.6, 0.8), prepared, tmp_path)
