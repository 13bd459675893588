"""LoRAs by Ray's workers: the dataset is whole even if one of them is killed."""

import io
import os
import signal
import sys
import threading
import time

import psutil
import pytest
from rich.console import Console
from test_cache import cached, world_cached  # noqa: F401
from test_loop import new_run

from training import cluster
from training.config import DataConfig, LoRAConfig, TrainingConfig
from training.loop import Run
from training.lora_dataset import LoRAFolder, checksum

SETTINGS = {
    "data": DataConfig(clips_per_task=1, held_out_tasks=20, lora_tasks=8),
    "lora": LoRAConfig(rank=2, steps=40, batch=2, tasks_at_once=2),
}


def test_without_ray_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"--ray local: Ray is not installed. .* pip install .\[cluster\]"):
        with cluster.ray_workers("local", data=None):
            pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # two workers
    run = new_run(tmp_path / "run", **SETTINGS)
    monkeypatch.setattr(run.data, "held_out", [])  # whose clips would have to be drawn and encoded
    run.console = Console(file=io.StringIO(), width=200)
    return run


def training_workers():
    """The processes of this one's cluster that are training a batch."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if process.cmdline()[:1] == ["ray::_train"]]


def kill_one(folder, killed):
    """kill -9 to a worker that has begun a batch when the first LoRA is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not killed:
        workers = training_workers()
        if workers and any(folder.glob("*.safetensors")):
            workers[0].send_signal(signal.SIGKILL)
            killed.append(workers[0].pid)
        time.sleep(0.05)


def assert_whole(folder, tasks):
    records = LoRAFolder(folder).valid()
    assert set(records) == tasks == {path.stem for path in folder.glob("*.safetensors")}
    assert all(checksum(folder / record.file) == record.sha256 for record in records.values())


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_no_lora(run):
    folder, killed = run.folder / "loras_training", []
    killer = threading.Thread(target=kill_one, args=(folder, killed))
    killer.start()
    held_out, training = run.lora_dataset(ray="local")
    killer.join()
    assert len(killed) == 1 and not psutil.pid_exists(killed[0])
    assert len(training.done) == 8 and not training.failed and not held_out.done
    assert_whole(folder, {task.id for task in run._lora_tasks()})
    again = run.lora_dataset(ray="local")[1]
    assert len(again.skipped) == 8 and not again.done


@pytest.mark.slow
def test_a_batch_that_kills_every_worker_fails_alone(run, monkeypatch):
    doomed = run._lora_tasks()[3].id

    def deadly(base, batch):
        from training import cluster

        if doomed in batch.clips:
            os.kill(os.getpid(), signal.SIGKILL)
        return cluster._train(base, batch)

    monkeypatch.setattr(cluster, "_train", deadly)
    monkeypatch.setattr(cluster, "RETRIES", 1)
    training = run.lora_dataset(ray="local")[1]
    assert len(training.done) == 6 and len(training.failed) == 2 and not training.retried
    assert training.failed[doomed] == "its worker died 2 times (WorkerCrashedError)"
    assert_whole(run.folder / "loras_training", set(training.done))


@pytest.mark.slow
def test_workers_train_on_a_folder_too(cached):  # noqa: F811
    pytest.importorskip("ray")
    lora = LoRAConfig(rank=2, steps=2, batch=1)
    config = TrainingConfig("miniature", str(cached.run), data=cached.config, lora=lora)
    run = Run(config, Console(file=io.StringIO(), width=200))
    run.cache()
    held_out, training = run.lora_dataset("local")
    assert (held_out.done, training.done) == (("task 3",), ("task 0", "task 1", "task 2"))
