"""The LoRA dataset: a folder of ordinary LoRA files, one a task, and a manifest that says which are good."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_files import load_lora, save_lora, write_safetensors

from .miniature.world import Action

MANIFEST = "manifest.jsonl"
# "diverged": to be trained once more at half the learning rate; "failed": not to be tried again in this run.
Status = Literal["done", "diverged", "failed"]


@dataclass
class LoRADataset:
    """A [K, L, r, in] and B [K, L, out, r] float32 (alpha folded into B) of K actions."""

    A: Tensor
    B: Tensor
    actions: list[Action]

    def factors(self) -> Tensor:
        """Factor indices [K, F]."""
        return torch.tensor([action.indices() for action in self.actions])

    def save(self, path: Path) -> None:
        """One file of all tasks, as the package ships them. Half precision: the factors are of order 0.1 and
        are compared through what they do.
        """
        metadata = {"actions": json.dumps([astuple(action) for action in self.actions])}
        write_safetensors({"A": self.A.half().contiguous(), "B": self.B.half().contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: Path) -> "LoRADataset":
        """What `save` wrote."""
        with safe_open(path, "pt") as file:
            actions = [Action(*values) for values in json.loads(file.metadata()["actions"])]
            return cls(file.get_tensor("A").float(), file.get_tensor("B").float(), actions)


def task_id(action: Action) -> str:
    """A readable name, such as left_arm-wide-slow-stay-upright-apart."""
    return "-".join(astuple(action))


def task_metadata(action: Action) -> dict[str, str]:
    """What a task's LoRA file says about the task: its id, and the action as `Action(**json)`."""
    return {"task": task_id(action), "action": json.dumps(asdict(action))}


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
    def read(cls, line: str) -> "Record | None":
        """A line's record; None for a line that is torn or not a record."""
        try:
            values = json.loads(line)
            own = {name: values.pop(name) for name in ("task", "status", "file", "sha256", "loss", "reason")}
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            return None
        return cls(**own, settings=values)


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
        lines = self.manifest.read_text(encoding="utf-8", errors="replace").splitlines()
        found = (Record.read(line) for line in lines)
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
        """Add lines to the manifest, each by a single write at its end; they are on the disk on return."""
        with self.manifest.open("ab") as file:
            for record in records:
                file.write(record.line().encode())
                file.flush()
            os.fsync(file.fileno())

    def write(self, metadata: dict[str, str], names: Sequence[str], A: Tensor, B: Tensor) -> tuple[str, str]:
        """Save a task's LoRA, A [L, r, in] and B [L, out, r] with dW = B A, in half precision under the names
        that ComfyUI loads. Returns the file's name and its SHA-256; the line is the caller's to append.
        """
        layers = {name: LoRALayer(a, b, alpha=float(len(a))) for name, a, b in zip(names, A, B, strict=True)}
        path = self.path / f"{metadata['task']}.safetensors"
        save_lora(LoRA(layers, metadata), path, dtype=torch.float16)
        return path.name, checksum(path)

    def load(self, names: Sequence[str], actions: Iterable[Action]) -> LoRADataset:
        """The valid LoRAs among those of `actions`, in that order; `names` orders the layers.

        Raises ValueError where there is none.
        """
        valid = self.valid()
        kept = [action for action in actions if task_id(action) in valid]
        if not kept:
            raise ValueError(f"{self.path}: no valid LoRA of this configuration's tasks. Run `lora-dataset`.")
        loras = [load_lora(self.path / str(valid[task_id(action)].file)) for action in kept]
        A = [torch.stack([lora[name].A.float() for name in names]) for lora in loras]
        B = [torch.stack([_folded(lora[name]) for name in names]) for lora in loras]
        return LoRADataset(torch.stack(A), torch.stack(B), kept)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folded(layer: LoRALayer) -> Tensor:
    return layer.B.float() * (layer.alpha / layer.rank)
