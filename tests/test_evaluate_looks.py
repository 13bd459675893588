"""The tables of a network that is told actions by text and looks by style: each apart, and both at once."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_evaluate import SETTINGS, Decoder
from tiny import CONFIG, STYLE, condition, describe, network
from tiny_tasks import DIM, RANK, TEXT, Tasks, loras

from lofa_core.conditions import Given
from lofa_core.descriptions import ConditionDescription
from training import judge as module
from training.evaluate import added, evaluate
from training.judge import Judge, Method, predicted_factors
from training.lora_dataset import LoRADataset
from training.miniature import world
from training.miniature.world_tasks import WorldTask, all_looks

ACTIONS = [WorldTask(action) for action in world.all_actions()[::100]]  # five
LOOKS = [WorldTask(look=look) for look in all_looks()[::36]]
BOTH = [WorldTask(a.action, b.look) for a, b in zip(ACTIONS, LOOKS, strict=True)]


class Reader:
    """Reads so many factors of two values from the mean colours of so many parts of a clip."""

    def __init__(self, factors):
        self.factors = factors

    def read(self, clips):
        means = clips.reshape(len(clips), self.factors, -1).mean(2)
        return (means > 127).astype(int), means / 50.0


class WorldTasks(Tasks):
    """The tiny base model with the world's tasks."""

    kinds = ("text", "style")

    def __init__(self):
        super().__init__(training=ACTIONS, held_out=[*ACTIONS, *LOOKS])

    def held_out_clips(self, each, offset=0, tasks=None):
        return SimpleNamespace(latents=self._latents(each * len(tasks or self.held_out), 100 + offset))

    def conditions(self, told):
        found = {}
        if "text" in told[0]:
            states = self.prompts([one["text"] for one in told]).states[:, :-1]
            found["text"] = Given(states, torch.ones(len(told)))
        if "style" in told[0]:
            seeds = [all_looks().index(look) for ((look, _),) in (one["style"] for one in told)]
            found["style"] = Given(torch.cat([condition(seed=seed, width=STYLE.width) for seed in seeds]))
        return found


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    config = SimpleNamespace(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    monkeypatch.setattr(module, "load_vae", lambda base: SimpleNamespace(config=config))
    monkeypatch.setattr(module, "WholeClipVAE", Decoder)
    monkeypatch.setattr(module.look_reader_module, "load", lambda: Reader(3))


@pytest.fixture(scope="module")
def net():
    words = ConditionDescription("text", TEXT, coarse_prompt="a person moves")
    config, base = replace(CONFIG, rank=RANK), describe(depths=1, shape=(DIM, DIM))
    return network(0, config, base, True, (words, STYLE))


def test_a_judge_of_both_reads_both_and_says_how_many_of_each_are_right(monkeypatch):
    judge = Judge(WorldTasks(), BOTH, SETTINGS, Reader(6))
    assert judge.labels.shape == (10, 9)
    assert judge.labels[::2].tolist() == [list(task.indices()) for task in BOTH]
    indices, features = judge.read(judge.real.latents.float())
    assert indices.shape == (10, 9) and features.shape == (10, 9)
    for part, only in ((slice(6), ACTIONS), (slice(6, 9), LOOKS)):
        alone = Judge(WorldTasks(), only, SETTINGS, Reader(6)).read(judge.real.latents.float())
        assert (indices[:, part] == alone[0]).all() and np.allclose(features[:, part], alone[1])
    read = judge.labels.copy()
    read[0, 2] += 1
    read[0, 7] += 1
    read[4, 8] += 1
    monkeypatch.setattr(judge, "_read", lambda clips: (read, features))
    found = judge.score(judge.real.latents.float())
    assert found["joint"] == pytest.approx(8 / 10)
    assert (found["joint_action"], found["joint_look"]) == (pytest.approx(9 / 10), pytest.approx(8 / 10))
    assert found["accuracy_action"] == pytest.approx(59 / 60)
    assert found["accuracy_look"] == pytest.approx(28 / 30)
    wrong = {name: 1 - found[f"right: {name}"] for name in ("limb", "tempo", "trousers", "backdrop")}
    assert wrong == pytest.approx({"limb": 0.0, "tempo": 0.1, "trousers": 0.1, "backdrop": 0.1})


def test_actions_looks_and_both_have_tables_of_their_own(net):
    data, draw = WorldTasks(), np.random.default_rng(SETTINGS.seed)
    known = LoRADataset(loras(10, 1), [*ACTIONS, *LOOKS])
    wanted = LoRADataset(loras(10, 2, 0.5), data.held_out)
    found = evaluate(net, data, SETTINGS, known, wanted, Reader(6))
    assert found["condition"] == "text" and found["looks"]["condition"] == "style"
    for table, tasks, rows in ((found, ACTIONS, slice(0, 5)), (found["looks"], LOOKS, slice(5, 10))):
        judge = Judge(data, tasks, SETTINGS, Reader(6))
        own = judge.measure(Method("own", wanted.loras[rows]))
        assert table["rows"]["per-task LoRA"] == pytest.approx(own, rel=1e-3, abs=1e-6)
        assert {"base", "mean LoRA", "nearest LoRA", "ridge regression", "LoFA"} <= set(table["rows"])
        assert {"frechet_gap_closed", "beaten", "stage1_centred_cosine"} <= set(table)
    told = [
        {
            "text": data.reserved_sentence(WorldTask(task.action), draw),
            "style": [(task.look, 0)],
        }
        for task in BOTH
    ]
    judge, rows = Judge(data, BOTH, SETTINGS, Reader(6)), found["both"]["rows"]
    text, style = ([{kind: one[kind]} for one in told] for kind in ("text", "style"))
    text, style, together = (predicted_factors(net, data, some) for some in (text, style, told))
    for name, factors in {
        "base": None,
        "LoFA, text": text,
        "LoFA, style": style,
        "LoFA, text + style": together,
        "both LoRAs added up": added(text, style),
    }.items():
        assert rows[name] == pytest.approx(judge.measure(Method(name, factors)), rel=1e-3, abs=1e-6), name
    assert rows["LoFA, text"] != rows["LoFA, style"] != rows["LoFA, text + style"]
