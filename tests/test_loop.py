"""A whole run in a few seconds: LoRAs, Stage I, Stage II on the shipped base, three steps each."""

import dataclasses
import functools
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import generator

from lofa_core import miniature
from lofa_core.base_models import BaseWeights
from lofa_core.checkpoint import load_hypernetwork
from lofa_core.prediction import predict
from training import loop, lora_run
from training.config import DataConfig, LoRAConfig, NetworkConfig, Stage1Config, Stage2Config, TrainingConfig
from training.evaluate import Sharing
from training.factors import Factors
from training.loop import Run
from training.lora_dataset import LoRADataset, LoRAFolder, evenly_spread
from training.miniature import world
from training.miniature.latents import LatentClips
from training.miniature.tasks import MiniatureTasks
from training.miniature.world_tasks import WorldTask
from training.samples import write_samples


def config(folder, **changes):
    parts = {
        "data": DataConfig(clips_per_task=1, held_out_tasks=20, lora_tasks=2),
        "lora": LoRAConfig(rank=2, steps=3, batch=1, tasks_at_once=10),
        "network": NetworkConfig(
            grid=(2, 2), width=16, heads=2, blocks=2, mlp_ratio=1, pooling_queries=2, feature_blocks=(1,)
        ),
        "stage1": Stage1Config(steps=3, tasks=2, layers=4),
        "stage2": Stage2Config(steps=3, tasks=2, clips=1),
    }
    return TrainingConfig("miniature", str(folder), **(parts | changes))


def new_run(folder, **changes):
    """A run whose training clips are noise, so that 460 of them need not be drawn and encoded."""
    folder.mkdir(exist_ok=True)
    actions, _ = world.split_actions(20, 0)
    labels = torch.tensor([action.indices() for action in actions], dtype=torch.uint8)
    noise = torch.randn(len(actions), 16, 5, 8, 8, generator=generator(0)).half()
    LatentClips(noise, labels, torch.zeros(len(actions), 3, dtype=torch.uint8)).save(folder / "latents.pt")
    return Run(config(folder, **changes), Console(file=io.StringIO(), width=200))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = new_run(tmp_path_factory.mktemp("run"))
    run.data.held_out_clips = functools.cache(run.data.held_out_clips)
    for part in (run.lora_dataset, run.stage1, run.stage2):
        part()
    return run


def test_loras_are_trained_for_every_held_out_action_and_spread_over_the_training_ones(finished):
    training, held_out = (list(map(WorldTask, actions)) for actions in world.split_actions(20, 0))
    folder = finished.folder / "loras_held_out"
    files = {path.stem for path in folder.glob("*.safetensors")}
    assert files == {task.id for task in held_out} == set(LoRAFolder(folder).valid())
    assert finished._dataset("held_out").tasks == held_out
    known = finished._dataset("training")
    assert known.tasks == [training[0], training[230]] and known.loras.A[0].shape == (2, 32, 2, 96)
    assert known.loras.B[0].abs().amax(dim=(2, 3)).min() > 0
    assert not set(known.tasks) & set(held_out)
    assert "20 trained, 0 were there" in finished.console.file.getvalue()


def test_what_is_written_is_a_hypernetwork_for_the_base(finished):
    assert {"stage1", "stage1.safetensors", "stage2", "hypernetwork.safetensors"} <= {
        p.name for p in finished.folder.iterdir()
    }
    network = load_hypernetwork(finished.folder / "hypernetwork.safetensors")
    stage1 = load_hypernetwork(finished.folder / "stage1.safetensors")
    for key, value in stage1.stage1.state_dict().items():
        assert torch.allclose(network.stage1.state_dict()[key], value, atol=1e-3, rtol=1e-2)
    known = finished._dataset("training")
    assert torch.allclose(stage1.statistics["96x96"].A_mean, known.loras.A[0].mean(0), atol=1e-5)
    assert network.config.rank == 2 and network.config.feature_blocks == (1,)
    base = BaseWeights.open(miniature.FOLDER)
    assert network.base.fingerprint == base.fingerprint()
    found = predict(network, base, finished.data.conditions([{"text": "a person jumps up"}]))
    assert len(found.lora) == 32 and all(torch.isfinite(found.lora.delta(name)).all() for name in found.lora)


def test_at_the_end_there_are_samples_and_heatmaps_of_held_out_tasks_to_look_at(finished, tmp_path):
    names = [task.id for task in finished.data.held_out[:2]]
    wanted = {f"{name}{part}.png" for name in names for part in ("", "_response")}
    assert {path.name for path in (finished.folder / "samples").iterdir()} == wanted
    network = load_hypernetwork(finished.folder / "hypernetwork.safetensors")
    network.statistics["96x96"].B_mean.normal_(std=0.1, generator=generator(3))
    for path in write_samples(network, finished.data, tmp_path, torch.device("cpu")):
        shown, before = (np.array(Image.open(p)) for p in (path, finished.folder / "samples" / path.name))
        if path.stem.endswith("_response"):
            assert shown.shape == before.shape and (shown != before).any()
        else:  # the base above is the same, the LoRA below another one
            assert shown.shape == (2 * 64, 9 * 64, 3)
            assert (shown[:64] == before[:64]).all() and (shown[64:] != before[64:]).mean() > 0.1


def test_loras_that_are_lost_are_trained_again_and_no_others(finished, monkeypatch):
    trained = []

    def counted(denoiser, layers, clips, *rest, **kwargs):
        trained.extend(clips)
        return real(denoiser, layers, clips, *rest, **kwargs)

    real = lora_run.train_loras
    monkeypatch.setattr(lora_run, "train_loras", counted)
    finished.lora_dataset()
    assert trained == []
    lost = finished.data.held_out[7]
    before = finished._dataset("held_out")
    (finished.folder / "loras_held_out" / f"{lost.id}.safetensors").unlink()
    again = Run(finished.config, finished.console)  # as after an interruption
    again.data.held_out_clips = finished.data.held_out_clips
    held_out, training = again.lora_dataset()
    after = again._dataset("held_out")
    assert trained == [lost.id] == list(held_out.done) and len(training.skipped) == 2
    assert after.tasks == before.tasks
    assert torch.allclose(after.loras.flat(), before.loras.flat(), atol=1e-3)


def test_runs_may_share_a_folder_of_loras(finished, tmp_path):
    data = dataclasses.replace(finished.config.data, loras=str(finished.folder))
    second = new_run(tmp_path / "second", data=data)
    second.data.held_out_clips = finished.data.held_out_clips
    for name in ("training", "held_out"):
        own, shared = second._dataset(name), finished._dataset(name)
        assert own.tasks == shared.tasks and torch.equal(own.loras.flat(), shared.loras.flat())
    assert [len(summary.done) for summary in second.lora_dataset()] == [0, 0]
    assert not list(second.folder.glob("loras_*"))
    nowhere = tmp_path / "nowhere"
    third = new_run(tmp_path / "third", data=dataclasses.replace(data, loras=str(nowhere)))
    with pytest.raises(ValueError, match="nowhere: no LoRAs here yet. Run `lora-dataset`"):
        third.stage1()  # rather than with the shipped ones


def test_ray_and_torchrun_exclude_each_other(finished, monkeypatch):
    monkeypatch.setattr(finished, "processes", 2)
    with pytest.raises(ValueError, match="--ray local: .* without torchrun"):
        finished.lora_dataset(ray="local")


def test_parts_that_come_too_early_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SHIPPED", tmp_path / "nothing_shipped")
    run = new_run(tmp_path / "run")
    for part in (run.stage1, run.stage2):
        with pytest.raises(ValueError, match="no LoRAs here yet. Run `lora-dataset`"):
            part()
    monkeypatch.setattr(run, "_dataset", lambda name: LoRADataset(Factors((), ()), []))
    with pytest.raises(FileNotFoundError, match=r"stage1\.safetensors"):
        run.stage2()


def test_another_base_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match='base = "WAN2.1-T2V-1.3B"'):
        Run(TrainingConfig("WAN2.1-T2V-1.3B", str(tmp_path / "run")), Console(file=io.StringIO()))
    assert not list(tmp_path.iterdir())


def test_evaluation_says_its_table_and_keeps_its_figures(finished, monkeypatch):
    given = {}
    row = {"joint": 0.123456, "mean_accuracy": 0.5, "frechet": 3.25, "diversity": 0.1}
    figures = {
        "rows": {"base": row | {"flow_matching": 0.5}, "real clips": row},
        "frechet_gap_closed": 0.612345,
        "beaten": ["base"],
    }

    def measured(network, data, settings, known, wanted, evaluator, report, sharing, more, others, diffusion):
        assert (sharing, more, others, diffusion) == (Sharing(0, 1), False, {}, None)
        given.update(network=network, known=known, wanted=wanted, evaluator=evaluator)
        return figures

    monkeypatch.setattr(loop, "evaluate", measured)
    monkeypatch.setattr(loop.evaluator_module, "load", lambda: "the evaluator")
    found = finished.evaluate(finished.folder / "hypernetwork.safetensors")
    assert given["network"].config.rank == 2 and given["evaluator"] == "the evaluator"
    assert given["wanted"].tasks == finished.data.held_out and len(given["known"].tasks) == 2
    assert (
        found["frechet_gap_closed"] == 0.6123
        and found["rows"]["base"]["joint"] == 0.1235
        and found["seconds"] > 0
    )
    assert json.loads((finished.folder / "evaluation.json").read_text()) == found
    assert "real clips" in finished.console.file.getvalue()
    torch.set_num_threads(1)


def test_a_run_ships_its_network_its_figures_and_its_loras(finished, tmp_path, monkeypatch):
    figures, network, said = tmp_path / "figures.json", tmp_path / "shipped.safetensors", []
    figures.write_text('{"vae": {"seed": 0}}')
    monkeypatch.setattr(loop, "SHIPPED", tmp_path)
    monkeypatch.setattr(loop, "write_figures", said.append)
    monkeypatch.setattr(miniature, "FIGURES", figures)
    monkeypatch.setattr(miniature, "HYPERNETWORK", network)
    (finished.folder / "evaluation.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no evaluation.json. Run `evaluate`; nothing ships unmeasured"):
        finished.ship()
    assert not network.exists()
    known, held_out = finished.packed("training"), finished.packed("held_out")
    (finished.folder / "evaluation.json").write_text('{"rows": {}}')
    finished.ship()
    assert network.read_bytes() == (finished.folder / "hypernetwork.safetensors").read_bytes()
    kept = json.loads(figures.read_text())
    assert (
        json.loads(json.dumps(said)) == [kept]
        and kept["vae"] == {"seed": 0}
        and kept["hypernetwork"]["rows"] == {}
    )
    assert kept["hypernetwork"]["config"]["lora"]["rank"] == 2
    for name, own in (("training", known), ("held_out", held_out)):
        packed = LoRADataset.load(tmp_path / f"loras_{name}.safetensors")
        assert packed.tasks == own.tasks and torch.equal(packed.loras.flat(), own.loras.flat())


def test_a_run_without_loras_goes_on_with_the_shipped_ones_and_says_how_many(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run", data=DataConfig(clips_per_task=1, lora_tasks=64))
    known = run._dataset("training")
    assert len(known.tasks) == 32 and set(known.tasks) < set(run._lora_tasks())
    said = run.console.file.getvalue()
    assert "no LoRAs here. Going on with the miniature's 32 of 64; `lora-dataset` makes them all" in said
    other = new_run(tmp_path / "other", data=DataConfig(clips_per_task=1, lora_tasks=1, training_tasks=1))
    nowhere = dataclasses.replace(known, tasks=known.tasks[1:])
    monkeypatch.setattr(LoRADataset, "load", lambda path: nowhere)
    with pytest.raises(ValueError, match="other: no LoRAs here, and the shipped ones are of other tasks"):
        other._dataset("training")


def test_stage_1_may_learn_from_more_loras_than_all_else(tmp_path):
    data = DataConfig(clips_per_task=1, lora_tasks=3)
    many = Stage1Config(steps=1, tasks=2, layers=4, lora_tasks=8)
    run = new_run(tmp_path / "run", data=data, lora=LoRAConfig(rank=4), stage1=many)
    three, eight = (evenly_spread(run.data.sorts(), count) for count in (3, 8))
    assert set(three) & set(eight) and set(run._lora_tasks()) == set(three) | set(eight)
    assert len(run._lora_tasks()) == 10  # those that get a LoRA of their own, one of them for both
    shipped = LoRADataset.load(loop.SHIPPED / "loras_training.safetensors").of(eight)
    assert run._dataset("training").tasks == [task for task in three if task in shipped.tasks]
    run.stage1()
    learned = load_hypernetwork(run.folder / "stage1.safetensors")
    assert len(shipped.tasks) == 8
    assert torch.allclose(learned.statistics["96x96"].A_mean, shipped.loras.A[0].mean(0), atol=1e-5)


def test_held_out_clips_come_from_seeds_of_their_own(finished):
    data = MiniatureTasks(finished.config.data, finished.folder)
    data.held_out = data.held_out[:2]
    first, again, other = (data.held_out_clips(2, offset) for offset in (1, 1, 2))
    assert [first.action(i) for i in range(4)] == [task.action for task in data.held_out for _ in range(2)]
    assert torch.equal(first.latents, again.latents) and not torch.equal(first.latents, other.latents)
    assert first.latents.dtype == torch.float16 and 0.3 < first.latents.float().std() < 3.0
