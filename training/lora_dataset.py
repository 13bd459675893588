"""The LoRA dataset: a folder of ordinary LoRA files, one a task, and a manifest that says which are good."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from lofa_core.documents import read_lines
from lofa_core.int8 import packed, unpacked
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import load_lora, read_safetensors, save_lora, write_safetensors

from .factors import Factors
from .miniature.world_tasks import WorldTask

MANIFEST = "manifest.jsonl"
# "diverged": to be trained once more at half the learning rate; "failed": not to be tried again in this run.
Status = Literal["done", "diverged", "failed"]


class Task(Protocol):
    """One personalisation. Prints as its id, by which it is told from others."""

    @property
    def id(self) -> str: ...

    def metadata(self) -> dict[str, str]:
        """What its LoRA's file says about it, besides the id."""
        ...


@dataclass
class LoRADataset:
    """The LoRAs of K tasks in float32, alpha folded into B."""

    loras: Factors
    tasks: list

    def indices(self) -> Tensor:
        """Factor indices [K, F] of tasks of the miniature's world."""
        return torch.tensor([task.indices() for task in self.tasks])

    def of(self, tasks: Iterable) -> "LoRADataset":
        """Those of these tasks that are there, in their order."""
        rows = {task: row for row, task in enumerate(self.tasks)}
        kept = [task for task in tasks if task in rows]
        return LoRADataset(self.loras[torch.tensor([rows[task] for task in kept])], kept)

    def save(self, path: Path) -> None:
        """One file of all tasks of the miniature's world, as the package ships them: every row of A and
        column of B in eight bits.
        """
        ((A, B),) = self.loras.pairs()  # its layers have one shape
        tasks = json.dumps([asdict(task) for task in self.tasks])
        metadata = {"tasks": tasks, "shape": json.dumps(A.shape[:3])}
        write_safetensors(packed({"A": A.flatten(0, 2), "B": B.mT.flatten(0, 2)}), path, metadata)

    @classmethod
    def load(cls, path: Path) -> "LoRADataset":
        """What `save` wrote."""
        tensors, metadata = read_safetensors(path)
        tasks = [WorldTask.read(values) for values in json.loads(metadata["tasks"])]
        rows = unpacked(tensors.items(), torch.float32)
        A, B = (rows[name].unflatten(0, json.loads(metadata["shape"])) for name in ("A", "B"))
        return cls(Factors((A,), (B.mT.contiguous(),)), tasks)


def evenly_spread(sorts: Iterable[Sequence], count: int) -> list:
    """`count` tasks of each sort, all where it has fewer, so that every factor value has its share."""
    chosen = []
    for tasks in sorts:
        few = min(count, len(tasks))
        chosen += [tasks[place * len(tasks) // few] for place in range(few)]
    return chosen


def shipped_loras(path: Path, wanted: Iterable, run: Path) -> LoRADataset:
    """Those of the wanted tasks that the miniature comes with, for a run that has none of its own. ValueError
    where there is not one.
    """
    all_ = LoRADataset.load(path)
    if not set(all_.tasks) & set(wanted):
        raise ValueError(
            f"{run}: no LoRAs here, and the shipped ones are of other tasks than this configuration's. Run "
            "`lora-dataset` with it first."
        )
    return all_.of(wanted)


@dataclass(frozen=True)
class Record:
    """One line of the manifest: what became of a task. A task's last line is the one that counts."""

    task: str
    status: Status
    file: str | None = None  # its name in the folder
    sha256: str | None = None
    loss: float | None = None
    reason: str | None = None  # of what is not done
    settings: dict[str, Any] = field(default_factory=dict)  # steps, learning_rate ...: the line's other keys

    def line(self) -> str:
        """One line of JSON: the fields, then the settings beside them."""
        values = asdict(self)
        settings = values.pop("settings")
        return json.dumps(values | settings) + "\n"

    @classmethod
    def read(cls, line: str | bytes) -> "Record | None":
        """A line's record; None for a line that is torn or not a record."""
        try:
            values = json.loads(line)
            own = {name: values.pop(name) for name in ("task", "status", "file", "sha256", "loss", "reason")}
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            return None
        texts = [own["task"], *(own[name] for name in ("file", "sha256", "reason") if own[name] is not None)]
        number = own["loss"] is None or type(own["loss"]) in (int, float)
        beside = own["file"] is None or not set("/\\\0") & set(str(own["file"]))  # datasets are passed on
        if not all(isinstance(text, str) for text in texts) or not number or not beside:
            return None
        return cls(**own, settings=values) if own["status"] in get_args(Status) else None


class LoRAFolder:
    """`<task id>.safetensors` of each task and `manifest.jsonl`.

    A file is written whole before its line, and a line in one go: whenever the program is killed, what the
    manifest calls done is done. Processes of one machine may append at once; where the folder is shared over
    a network only one may (Ray's driver does).
    """

    def __init__(self, path: Path):
        self.path, self.manifest = path, path / MANIFEST

    def records(self) -> dict[str, Record]:
        """The last record of each task, by task id; torn lines are passed over."""
        if not self.manifest.exists():
            return {}
        found = (Record.read(line) for line in read_lines(self.manifest))
        return {record.task: record for record in found if record}

    def valid(self) -> dict[str, Record]:
        """Of the tasks that are done, those whose file is there and has the checksum."""
        return {
            task: record
            for task, record in self.records().items()
            if record.status == "done"
            and (self.path / str(record.file)).is_file()
            and checksum(self.path / str(record.file)) == record.sha256
        }

    def prepare(self) -> None:
        """Make the folder and clear away what a kill has left: unfinished files, and lines that are torn (the
        next one would continue them) or replaced. Nobody else may write to it meanwhile.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob(".*.safetensors.*"):
            unfinished.unlink()
        if self.manifest.exists():
            whole = self.manifest.with_name(f".{MANIFEST}")
            whole.write_text("".join(record.line() for record in self.records().values()), encoding="utf-8")
            whole.replace(self.manifest)

    def append(self, records: Iterable[Record]) -> None:
        """Add lines to the manifest by a single write at its end, so that a batch is there or trained again
        as it was; they are on the disk on return.
        """
        with self.manifest.open("ab") as file:
            file.write("".join(record.line() for record in records).encode())
            file.flush()
            os.fsync(file.fileno())

    def write(
        self, metadata: dict[str, str], names: Sequence[str], A: Sequence[Tensor], B: Sequence[Tensor]
    ) -> tuple[str, str]:
        """Save a task's LoRA, of each layer A [r, in] and B [out, r] with dW = B A, in half precision under
        the names that ComfyUI loads. Returns the file's name and its SHA-256; the line is the caller's to
        append.
        """
        layers = {name: LoRALayer(a, b, alpha=float(len(a))) for name, a, b in zip(names, A, B, strict=True)}
        path = self.path / f"{metadata['task']}.safetensors"
        save_lora(LoRA(layers, metadata), path, dtype=torch.float16)
        return path.name, checksum(path)

    def load(self, groups: Sequence[Sequence[str]], tasks: Iterable[Task]) -> LoRADataset:
        """The valid LoRAs among those of `tasks`, in that order; `groups`: the names of each shape's layers.

        Raises ValueError where there is none, and naming one that is of other layers, shapes or rank.
        """
        valid = self.valid()
        kept = [task for task in tasks if task.id in valid]
        if not kept:
            raise ValueError(f"{self.path}: no valid LoRA of this configuration's tasks. Run `lora-dataset`.")
        files = [self.path / str(valid[task.id].file) for task in kept]
        loras = [load_lora(file) for file in files]
        sizes = [_sizes(file, lora, groups) for file, lora in zip(files, loras, strict=True)]
        for file, size in zip(files, sizes, strict=True):
            if size != sizes[0]:
                raise ValueError(
                    f"{file}: its layers are {size}, those of {files[0].name} {sizes[0]}. "
                    "Remove one of them and run `lora-dataset`."
                )
        A = (torch.stack([_stack(lora[n].A.float() for n in names) for lora in loras]) for names in groups)
        B = (torch.stack([_stack(_folded(lora[n]) for n in names) for lora in loras]) for names in groups)
        return LoRADataset(Factors(tuple(A), tuple(B)), kept)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sizes(file: Path, lora: LoRA, groups: Sequence[Sequence[str]]) -> list[tuple[int, int, int]]:
    """(rank, out, in) of each group's layers. ValueError where it lacks one, or they differ."""
    found = []
    for names in groups:
        absent = [name for name in names if name not in lora]
        if absent:
            raise ValueError(
                f"{file}: has no {absent[0]}, so it is no LoRA of this configuration's base. "
                "Remove it and run `lora-dataset`."
            )
        sizes = sorted({(lora[name].rank, *lora[name].shape) for name in names})
        if len(sizes) > 1:
            raise ValueError(f"{file}: layers of one group are {sizes}. Remove it and run `lora-dataset`.")
        found += sizes
    return found


def _folded(layer: LoRALayer) -> Tensor:
    return layer.B.float() * (layer.alpha / layer.rank)


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors))
