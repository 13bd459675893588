"""One run: its folder, its stages in order, and what each leaves behind."""

import json
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from lofa_core import miniature
from lofa_core.checkpoint import load_hypernetwork, save_hypernetwork
from lofa_core.descriptions import HypernetworkConfig
from lofa_core.hypernetwork import Hypernetwork

from .config import TrainingConfig
from .evaluate import evaluate
from .lora_dataset import LoRADataset
from .lora_factory import LoRATraining, train_loras
from .miniature import evaluator as evaluator_module
from .miniature.tasks import MiniatureTasks
from .readme import write_figures
from .stages import train_stage1, train_stage2

SHIPPED = Path(__file__).parent / "miniature"  # the LoRAs that the README's figures rest on


class Run:
    """Stages read what earlier ones wrote into the run's folder; none keeps state in memory for the next."""

    def __init__(self, config: TrainingConfig, console: Console):
        if config.base != "miniature":
            raise ValueError(f'base = "{config.base}": only "miniature" can be trained so far.')
        self.config, self.console, self.folder = config, console, Path(config.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = MiniatureTasks(config.data, self.folder)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.process, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        torch.set_num_threads(1)  # at the miniature's size one thread a process beats several

    def loras(self) -> None:
        """Per-task LoRAs of `lora_tasks` training actions and of every held-out one; resumes after the last
        batch done.
        """
        with self.accelerator.main_process_first():
            training_clips = self.data.clips
        held_out = self.data.held_out_clips(self.config.data.clips_per_task, offset=2)
        for name, actions, clips in (
            ("held_out", self.data.held_out, held_out),
            ("training", self._lora_actions(), training_clips),
        ):
            self._train_loras(name, actions, [clips.latents[clips.of(action)] for action in actions])
        self.accelerator.wait_for_everyone()

    def stage1(self) -> None:
        """Fit the target statistics and Stage I; writes stage1.safetensors."""
        known = self._dataset("training")
        network = self._new_network()
        network.statistics.fit(known.A, known.B)
        train_stage1(
            network, self.data, known.actions, known.A, known.B, self.config.stage1, self._report("stage1")
        )
        if self.process == 0:
            save_hypernetwork(network, self.folder / "stage1.safetensors")
        self.accelerator.wait_for_everyone()

    def stage2(self) -> None:
        """Stage II from Stage I; writes hypernetwork.safetensors in half precision."""
        known = self._dataset("training")
        network = load_hypernetwork(self.folder / "stage1.safetensors").requires_grad_(True)
        checkpoint = self.folder / "stage2.pt"
        train_stage2(
            network,
            self.data,
            known.actions,
            known.A,
            known.B,
            self.config.stage2,
            checkpoint,
            self._report("stage2"),
        )
        if self.process == 0:
            save_hypernetwork(network.eval(), self.folder / "hypernetwork.safetensors", dtype=torch.float16)

    def evaluate(self, hypernetwork: Path | None, more: bool = False) -> dict:
        """The table on standard error; returns the figures. Uses the run's LoRAs, else the shipped ones."""
        started = time.time()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.processes))
        own = self.folder / "hypernetwork.safetensors"
        network = load_hypernetwork(hypernetwork or (own if own.exists() else miniature.HYPERNETWORK))
        found = evaluate(
            network, self.data, self.config.evaluation, self._dataset("training"), self._dataset("held_out"),
            evaluator_module.load(), self._say_row, self.process, self.processes, more,
        )  # fmt: skip
        found = _rounded(found | {"seconds": time.time() - started})
        if self.process == 0:
            self.console.print(_table(found["rows"]))
            (self.folder / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
        return found

    def ship(self) -> None:
        """Make this run's hypernetwork, LoRAs and figures the embedded ones, and the README's."""
        evaluation = self.folder / "evaluation.json"
        if not evaluation.exists():
            raise ValueError(
                f"{self.folder}: no evaluation.json. Run `evaluate` first; nothing ships unmeasured."
            )
        figures = json.loads(miniature.FIGURES.read_text())
        figures["hypernetwork"] = json.loads(evaluation.read_text()) | {"config": asdict(self.config)}
        for name in ("training", "held_out"):
            self._dataset(name).save(SHIPPED / f"loras_{name}.safetensors")
        shutil.copyfile(self.folder / "hypernetwork.safetensors", miniature.HYPERNETWORK)
        miniature.FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        write_figures(figures)

    def _train_loras(self, name: str, actions: list, clips: list) -> None:
        settings = self.config.lora
        parts = self.folder / f"loras_{name}"
        parts.mkdir(exist_ok=True)
        batches = range(math.ceil(len(actions) / settings.tasks_at_once))
        model, layers = self.data.load_model(), self.data.weights.model.layers
        training = LoRATraining(
            settings.rank, settings.steps, settings.batch, settings.learning_rate, settings.seed
        )
        for number in batches:
            path = parts / f"{number:04}.safetensors"
            if number % self.processes != self.process or path.exists():
                continue
            chosen = slice(number * settings.tasks_at_once, (number + 1) * settings.tasks_at_once)
            A, B = train_loras(
                model, layers, clips[chosen], self.data.coarse(), training, report=self._last(settings.steps)
            )
            LoRADataset(A, B, actions[chosen]).save(path)
            self.console.print(f"LoRAs {name}: batch {number + 1} of {len(batches)}")

    def _last(self, steps: int):
        def report(step: int, loss: float) -> None:
            if step == steps:
                self.console.print(f"flow-matching loss {loss:.4f}")

        return report

    def _dataset(self, name: str) -> LoRADataset:
        parts = sorted((self.folder / f"loras_{name}").glob("*.safetensors"))
        if not parts and not (SHIPPED / f"loras_{name}.safetensors").exists():
            raise ValueError(f"{self.folder}: no LoRAs here yet. Run `loras` with this configuration first.")
        loaded = [LoRADataset.load(path) for path in parts or [SHIPPED / f"loras_{name}.safetensors"]]
        return LoRADataset(
            torch.cat([x.A for x in loaded]),
            torch.cat([x.B for x in loaded]),
            [a for x in loaded for a in x.actions],
        )

    def _lora_actions(self) -> list:
        """Evenly spread over the training actions, so that every factor value has its share."""
        actions, count = self.data.training, self.config.data.lora_tasks
        return [actions[i * len(actions) // count] for i in range(count)]

    def _new_network(self) -> Hypernetwork:
        base, condition = self.data.descriptions()
        sizes = self.config.network
        out_features, in_features = base.layers[0].shape
        torch.manual_seed(self.config.stage1.seed)
        config = HypernetworkConfig(
            condition.width, out_features, in_features, self.config.lora.rank, sizes.patch, sizes.width,
            sizes.heads, sizes.blocks, sizes.mlp_ratio, sizes.pooling_queries, sizes.feature_blocks,
        )  # fmt: skip
        return Hypernetwork(config, base, condition)

    def _report(self, part: str):
        started = time.time()

        def report(step: int, figures: dict[str, float]) -> None:
            said = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self.console.print(f"{part} {time.time() - started:6.0f} s  step {step}  {said}")

        return report

    def _say_row(self, name: str, figures: dict[str, float]) -> None:
        self.console.print(name, {key: round(value, 4) for key, value in figures.items()})


def _table(rows: dict[str, dict[str, float]]) -> Table:
    table = Table("method", "flow matching", "joint", "mean accuracy", "Frechet", "diversity")
    for name, row in rows.items():
        loss = f"{row['flow_matching']:.4f}" if "flow_matching" in row else ""
        table.add_row(
            name, loss, f"{row['joint']:.3f}", f"{row['mean_accuracy']:.3f}", f"{row['frechet']:.2f}",
            f"{row['diversity']:.3f}",
        )  # fmt: skip
    return table


def _rounded(found):
    if isinstance(found, dict):
        return {key: _rounded(value) for key, value in found.items()}
    return round(found, 4) if isinstance(found, float) else found
