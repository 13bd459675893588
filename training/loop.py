"""One run: its folder, its stages in order, and what each leaves behind."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from torch import Tensor

from lofa_core import miniature
from lofa_core.checkpoint import load_generator, load_hypernetwork, save_hypernetwork, save_lora_diffusion
from lofa_core.descriptions import HypernetworkConfig
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.lora_files import read_safetensors, write_safetensors
from lofa_core.whole_files import cleared, copy_whole, write_whole

from . import cluster, lora_diffusion
from .baselines.text_to_lora import TextToLoRA, TextToLoRAStage
from .config import DiffusionConfig, TrainingConfig
from .data import published
from .data.cache import CacheSummary, cache_dataset
from .data.folder_tasks import open_tasks
from .end_to_end import EndToEnd
from .evaluate import Sharing, as_table, evaluate, rounded
from .looks import Predictor, names_by_shape
from .lora_dataset import LoRADataset, LoRAFolder, evenly_spread, shipped_loras
from .lora_factory import initial_A
from .lora_run import Summary, make_dataset, train_here
from .machine import cores
from .miniature import evaluator as evaluator_module
from .readme import write_figures
from .samples import write_samples
from .stage1 import Stage1
from .stages import Diffusion, Stage2
from .trainer import Stage, train

TEXT_TO_LORA = "text_to_lora.safetensors"
SHIPPED = Path(__file__).parent / "miniature"  # the LoRAs that the README's figures rest on


class Run:
    """Stages read what earlier ones wrote into the run's folder; none keeps state in memory for the next."""

    def __init__(self, config: TrainingConfig, console: Console):
        self.config, self.console, self.folder = config, console, Path(config.out)
        self.data = open_tasks(config.base, config.data, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.process, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        torch.set_num_threads(1)  # at the miniature's size one thread a process beats several

    def cache(self) -> CacheSummary:
        """Latents and text states of data.folder, in cache/, and data_report.json: what is left out and why.
        What is valid there stays.
        """
        if not self.config.data.folder:
            raise ValueError("data.folder is empty: the miniature's world needs no `cache`.")
        torch.set_num_threads(max(1, cores() // self.processes))
        try:
            return cache_dataset(
                self.config.data, self.data.base, self.folder, self.accelerator, self.console
            )
        finally:
            torch.set_num_threads(1)

    def lora_dataset(self, ray: str | None = None) -> list[Summary]:
        """Per-task LoRAs of the training tasks that a stage learns from and of every held-out one, into
        `data.loras` or the run's folder. What is valid there stays; `ray` is a cluster's address, or "local".
        """
        if ray and self.processes > 1:
            raise ValueError(f"--ray {ray}: Ray starts its own processes. Run this command without torchrun.")
        if self.config.data.folder:
            self._import_loras()
        found = []
        with (
            cluster.ray_workers(ray, self.data)
            if ray
            else nullcontext(train_here(self.data, self.device)) as train_batches
        ):
            for name, tasks, latents in (
                ("held_out", self.data.held_out, self._held_out_latents),
                ("training", self._lora_tasks(), self._training_latents),
            ):
                folder = LoRAFolder(self._lora_folder(name).path.resolve())
                found.append(
                    make_dataset(
                        folder, tasks, latents, self.data.coarse(), self.config.lora, train_batches,
                        self.accelerator, lambda words: self.console.print(words, soft_wrap=True),
                    )
                )  # fmt: skip
        if self.process == 0:
            for summary in found:
                self.console.print(str(summary), soft_wrap=True)
        return found

    def stage1(self) -> None:
        """Fit the target statistics and Stage I; writes stage1.safetensors."""
        known = self._dataset("training", self.config.stage1.lora_tasks)
        network = _fitted(self.new_network(), known)
        network.stage1.trunk.checkpoint_activations = self.config.stage1.checkpoint_activations
        self._train(Stage1(network, self.data, known, self._held_out(), self.config.stage1, self.device))
        self._save(network, "stage1.safetensors", torch.float32)

    def stage2(self) -> None:
        """Stage II from Stage I; writes hypernetwork.safetensors."""
        known = self._dataset("training")
        self._check_prompts(self.config.stage2, known.tasks)
        if self.config.stage2.from_stage1:
            network = load_hypernetwork(self.folder / "stage1.safetensors").requires_grad_(True)
        elif self.config.network.feature_blocks:
            raise ValueError("stage2.from_stage1 = false has no features: set network.feature_blocks = [].")
        else:
            network = _fitted(self.new_network(), known)
        network.stage2.trunk.checkpoint_activations = self.config.stage2.checkpoint_activations
        stage = Stage2(network, self.data, known, self._held_out(), self.config.stage2, self.device)
        self._train(stage)
        self._finish(stage, network)

    def end_to_end(self) -> None:
        """Both stages from clips alone; writes hypernetwork.safetensors."""
        settings = self.config.end_to_end
        self._check_prompts(settings, [])
        network = self.new_network()
        if network.statistics is not None:
            start = initial_A(self.data.weights.model.layers, self.config.lora.rank, settings.seed)
            for statistics, names in zip(network.statistics.values(), names_by_shape(network), strict=True):
                statistics.start(torch.stack([start[name] for name in names]), settings.output_scale)
        for stage in (network.stage1, network.stage2):
            stage.trunk.checkpoint_activations = settings.checkpoint_activations
        stage = EndToEnd(network, self.data, settings, self.device)
        self._train(stage)
        self._finish(stage, network)

    def text_to_lora(self) -> None:
        """The MLP baseline on the same LoRAs and clips; writes text_to_lora.safetensors."""
        known, settings = self._dataset("training"), self.config.text_to_lora
        self._check_prompts(settings, known.tasks)
        network = _fitted(self._new_text_to_lora(), known)
        stage = TextToLoRAStage(network, self.data, known, self._held_out(), settings, self.device)
        self._train(stage)
        stage.finish()
        if self.process == 0:
            write_safetensors(network.state_dict(), cleared(self.folder / TEXT_TO_LORA), {})
        self.accelerator.wait_for_everyone()

    def _new_text_to_lora(self) -> TextToLoRA:
        settings = self.config.text_to_lora
        torch.manual_seed(settings.seed)
        return TextToLoRA(*self.data.descriptions(), self.config.lora.rank, settings.width, settings.blocks)

    def lora_diffusion(self) -> None:
        """LoRA Diffusion, the VAE first; writes lora_diffusion.safetensors."""
        known, path = self._dataset("training"), self.folder / lora_diffusion.FILE
        network = lora_diffusion.learned(
            self.config, self.data, known, self._held_out(), self.device, self._train
        )
        if self.process == 0:
            save_lora_diffusion(network.eval(), cleared(path), dtype=getattr(torch, self.config.stored_as))
            self.console.print(f"wrote {path}", soft_wrap=True)
        self.accelerator.wait_for_everyone()

    def _finish(self, stage: Diffusion, network: Hypernetwork) -> None:
        """Keep the averaged weights, and show what they do: samples/."""
        stage.finish()
        self._save(network, "hypernetwork.safetensors", getattr(torch, self.config.stored_as))
        if self.process == 0:
            written = write_samples(network, self.data, self.folder / "samples", self.device)
            if written:
                self.console.print(
                    f"wrote {len(written)} pictures into {self.folder / 'samples'}", soft_wrap=True
                )
        self.accelerator.wait_for_everyone()

    def _check_prompts(self, settings: DiffusionConfig, known: Sequence) -> None:
        """The teacher is a task's own LoRA or, without one, the base model under the task's prompt."""
        if not self.config.data.folder or not settings.distillation_weight or settings.with_lora == 1.0:
            return
        mute = [task.id for task in self.data.without_prompt() if task not in known]
        if mute:
            raise ValueError(
                f"distillation_weight = {settings.distillation_weight}: {len(mute)} training tasks have "
                "neither a prompt nor a LoRA of their own that a teacher could be made of, first "
                f"{mute[0]}. Give them prompts in tasks.jsonl and run `cache` again, or set "
                "distillation_weight = 0."
            )

    def _train(self, stage: Stage) -> None:
        # A step's tasks need not show every kind of condition to every process, nor its layers every shape.
        many = len(self.data.kinds) > 1 or len(self.data.base_description().by_shape()) > 1
        several = DistributedDataParallelKwargs(find_unused_parameters=many)
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[several])
        train(stage, stage.settings, self.folder / stage.name, accelerator, self.console)

    def _save(self, network: Hypernetwork, name: str, dtype: torch.dtype) -> None:
        path = self.folder / name
        if self.process == 0:
            save_hypernetwork(network.eval(), cleared(path), dtype=dtype)
            self.console.print(f"wrote {path}", soft_wrap=True)
        self.accelerator.wait_for_everyone()

    def _held_out(self) -> LoRADataset | None:
        """The held-out tasks' LoRAs, for validation; None where there are none yet."""
        try:
            return self._dataset("held_out")
        except ValueError:
            return None

    def evaluate(self, hypernetwork: Path | None, more: bool = False) -> dict:
        """The table on standard error; returns the figures. Uses the run's LoRAs as `ship` packs them, else
        the shipped ones.
        """
        self._refuse_folder("evaluate")
        started = time.time()
        torch.set_num_threads(max(1, cores() // self.processes))
        own = self.folder / "hypernetwork.safetensors"
        network = load_hypernetwork(hypernetwork or (own if own.exists() else miniature.HYPERNETWORK))
        second = self.folder / lora_diffusion.FILE
        found = evaluate(
            network, self.data, self.config.evaluation, self.packed("training"), self.packed("held_out"),
            evaluator_module.load(), self._say_row, Sharing(self.process, self.processes), more,
            self.baselines(), load_generator(second) if second.exists() else None,
        )  # fmt: skip
        found = rounded(found | {"seconds": time.time() - started})
        if self.process == 0:
            for table in (found, found.get("looks", {}), found.get("both", {})):
                if "rows" in table:
                    self.console.print(as_table(table["rows"]))
            write_whole(self.folder / "evaluation.json", json.dumps(found, indent=1) + "\n")
        return found

    def baselines(self) -> dict[str, Predictor]:
        """The run's own predictors in the hypernetwork's place, by the names of their rows."""
        path = self.folder / TEXT_TO_LORA
        if not path.exists():
            return {}
        network = self._new_text_to_lora()
        network.load_state_dict(read_safetensors(path)[0])
        return {"Text-to-LoRA MLP": network.eval()}

    def _packed_file(self, name: str) -> Path:
        return self.folder / f"loras_{name}.safetensors"

    def packed(self, name: str) -> LoRADataset:
        """The LoRAs as they are shipped, so that a clone measures the same."""
        if self.process == 0:
            self._dataset(name).save(self._packed_file(name))
        self.accelerator.wait_for_everyone()
        return LoRADataset.load(self._packed_file(name))

    def ship(self) -> None:
        """Make this run's hypernetwork, LoRAs and figures the embedded ones, and the README's."""
        self._refuse_folder("ship")
        evaluation = self.folder / "evaluation.json"
        if not evaluation.exists():
            raise ValueError(f"{self.folder}: no evaluation.json. Run `evaluate`; nothing ships unmeasured.")
        figures = json.loads(miniature.FIGURES.read_text())
        figures["hypernetwork"] = json.loads(evaluation.read_text()) | {"config": asdict(self.config)}
        for name in ("training", "held_out"):
            copy_whole(self._packed_file(name), SHIPPED / f"loras_{name}.safetensors")
        copy_whole(self.folder / "hypernetwork.safetensors", miniature.HYPERNETWORK)
        write_whole(miniature.FIGURES, json.dumps(figures, indent=1) + "\n")
        write_figures(figures)

    def _import_loras(self) -> None:
        """LoRAs that a dataset in the published layout brings; the others are trained."""
        source = Path(self.config.data.folder)
        if self.process == 0 and published.is_published(source):
            layers, into = self.data.weights.model.layers, self._lora_folder("training")
            done, problems = published.import_loras(source, layers, self.config.lora.rank, into)
            self.console.print(f"{source}: {len(done)} LoRAs taken over, {len(problems)} left out")
            for problem in problems:
                self.console.print(f"  {problem.what}: {problem.reason}", soft_wrap=True, markup=False)
        self.accelerator.wait_for_everyone()

    def _refuse_folder(self, command: str) -> None:
        if self.config.data.folder:
            raise ValueError(
                f"`{command}` draws and judges clips of the miniature's world; it cannot for data.folder = "
                f'"{self.config.data.folder}".'
            )

    def _training_latents(self) -> Callable[[Any], Tensor]:
        with self.accelerator.main_process_first():  # the first to ask encodes them
            latents_of, _ = self.data.latents_of, self.data.clips
        return latents_of

    def _held_out_latents(self) -> Callable[[Any], Tensor]:
        return self.data.held_out_latents(self.config.data.clips_per_task, self.config.lora.repeat)

    def _dataset(self, name: str, count: int = 0) -> LoRADataset:
        """The run's valid LoRAs of its "held_out" tasks or of `count` of its "training" tasks (0:
        `data.lora_tasks`), else the shipped ones.
        """
        folder, shipped = self._lora_folder(name), SHIPPED / f"loras_{name}.safetensors"
        few = evenly_spread(self.data.sorts(), count or self.config.data.lora_tasks)
        wanted = self.data.held_out if name == "held_out" else few
        if folder.manifest.exists():
            layers = self.data.weights.model.layers
            groups = self.data.base_description().by_shape().values()
            return folder.load([[layers[place].name for place in places] for places in groups], wanted)
        if self.config.data.folder or self.config.data.loras or not shipped.exists():
            raise ValueError(
                f"{folder.path.parent}: no LoRAs here yet. Run `lora-dataset` with this configuration first."
            )
        kept = shipped_loras(shipped, wanted, self.folder)
        if self.process == 0 and len(kept.tasks) < len(wanted):
            few = f"no LoRAs here. Going on with the miniature's {len(kept.tasks)} of {len(wanted)}"
            self.console.print(f"{self.folder}: {few}; `lora-dataset` makes them all.", soft_wrap=True)
        return kept

    def _lora_folder(self, name: str) -> LoRAFolder:
        return LoRAFolder(Path(self.config.data.loras or self.folder) / f"loras_{name}")

    def _lora_tasks(self) -> list:
        """The training tasks that some stage learns the LoRAs of, each once."""
        counts = self.config.data.lora_tasks, self.config.stage1.lora_tasks
        return list(dict.fromkeys(task for n in counts for task in evenly_spread(self.data.sorts(), n)))

    def new_network(self) -> Hypernetwork:
        """An untrained one of the configuration's design."""
        base, conditions = self.data.descriptions()
        if not self.config.network.mask_padding:  # then training has to see the padding that use brings
            conditions = tuple(
                replace(known, padded_to=self.data.text_rows) if known.kind == "text" else known
                for known in conditions
            )
        torch.manual_seed(self.config.stage1.seed)
        config = HypernetworkConfig(rank=self.config.lora.rank, **asdict(self.config.network))
        return Hypernetwork(config, base, conditions)

    def _say_row(self, name: str, figures: dict[str, float]) -> None:
        self.console.print(name, {key: round(value, 4) for key, value in figures.items()})


def _fitted(network: Hypernetwork | TextToLoRA, known: LoRADataset) -> Any:
    """The network, predicting offsets from the mean of the known LoRAs in units of their spread."""
    if network.statistics is not None:
        for statistics, (A, B) in zip(network.statistics.values(), known.loras.pairs(), strict=True):
            statistics.fit(A, B)
    return network
