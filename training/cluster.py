"""LoRAs on many machines: batches of tasks as Ray tasks, given to another worker where one dies.

Every machine needs this package (`pip install .[train,cluster]`) and sees the run's folder and the base model
under the same paths: workers write the LoRA files, the driver alone writes the manifest.
"""

import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .lora_dataset import Record
from .lora_run import Batch, Trainer, recorded, train_batch
from .over_base import OverBase

RETRIES = 5  # of a batch whose worker dies


@contextmanager
def ray_workers(address: str, data: OverBase) -> Iterator[Trainer]:
    """A trainer on the Ray cluster at `address`; "local" starts one here, a worker to each CPU core.

    Where the cluster has GPUs, a batch takes one of them, else one CPU core. Raises ValueError where Ray is
    not installed. Where no cluster answers, Ray itself keeps trying for minutes.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--ray {address}: Ray is not installed. Install it: pip install .[cluster]"
        ) from error
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    here = {"num_cpus": os.cpu_count(), "include_dashboard": False}
    ray.init(
        **(here if address == "local" else {}), address=address, log_to_driver=False, logging_level="warning"
    )
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=RETRIES)(_train)

    def train(batches: Iterable[Batch]) -> Iterator[list[Record]]:
        batches, running = iter(batches), {}
        most = 2 * (gpus or int(resources["CPU"]))  # a batch waits for each worker, and no more lie in memory
        while True:
            for batch in itertools.islice(batches, most - len(running)):
                running[remote.remote(data.base.resolve(), batch)] = batch
            if not running:
                return
            (ready,), _ = ray.wait(list(running))
            batch = running.pop(ready)
            try:
                records = ray.get(ready)
            except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
                reason = f"its worker died {RETRIES + 1} times ({type(error).__name__})"
                records = [
                    Record(task, "failed", reason=reason, settings=recorded(batch.settings))
                    for task in batch.clips
                ]
            yield records

    try:
        yield train
    finally:
        ray.shutdown()


def _train(base: Path, batch: Batch) -> list[Record]:
    return train_batch(*_base(base), batch)


@functools.cache  # once in the life of a worker
def _base(base: Path):
    data = OverBase(base)
    denoiser = data.load_denoiser()
    denoiser.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return denoiser, data.weights.model.layers
