"""Identity on the second miniature, judged as the paper's table 3: held-out people from one picture each.

`python -m training.faces.identity --config training/configs/faces_identity.toml` writes evaluation.json into
the run's folder. Every method draws the same people from the same noise: under the coarse prompt alone, and
in scenes that a prompt asks for, with guidance; LoRAs also with HM-CFG. `--end-to-end FILE` judges beside it
a hypernetwork that was trained as the HM-CFG paper's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from lofa_core.checkpoint import load_hypernetwork
from lofa_core.guidance import HybridGuidance
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.whole_files import write_whole

from ..baselines.simple import mean_lora, nearest_lora, ridge_lora
from ..config import TrainingConfig, load_config
from ..data.folder_tasks import FolderTasks
from ..denoisers import Denoiser
from ..factors import Factors, by_name
from ..injection import injected
from ..judge import predicted_factors
from ..looks import names_by_shape
from ..lora_dataset import LoRADataset, LoRAFolder
from ..lora_factory import train_loras
from ..miniature.sheets import sheet
from . import captions, evaluator, world
from .dataset import person
from .figures import of_people
from .model import CHANNELS, LATENT_SIZE, Base, Prompted, sample
from .portraits import to_pictures
from .vae import decode

SHIPPED = Path(__file__).with_name("lofa_faces_identity.safetensors")
EACH, SCENE_GUIDANCE = 4, 3.0
HYBRID = tuple(HybridGuidance(SCENE_GUIDANCE, SCENE_GUIDANCE * part) for part in (0.5, 1.0, 1.5))
SHOWN = 3  # people of the picture
_SEED = 31


@dataclass(frozen=True)
class Method:
    """A row: the people's LoRAs, or none; `words`: whether the prompt says what the person looks like."""

    name: str
    loras: Factors | None
    words: bool = False


class Studio:
    """Draws held-out people under a method and reads what came out."""

    def __init__(
        self,
        base: Base,
        denoiser: Denoiser,
        people: Sequence[world.Identity],
        groups: Sequence[Sequence[str]],
    ):
        self.base, self.unet, self.people, self.groups = base, denoiser.model, list(people), groups
        self.modules = denoiser.modules([name for names in groups for name in names])
        self.reader = evaluator.load(base.folder / "evaluator.safetensors")
        rng = np.random.default_rng(_SEED)
        self.scenes = [[world.random_attributes(rng) for _ in range(EACH)] for _ in people]
        self.word_seeds = [int(rng.integers(2**31)) for _ in people]
        self.noise = torch.randn(
            len(people), EACH, CHANNELS, LATENT_SIZE, LATENT_SIZE,
            generator=torch.Generator().manual_seed(_SEED),
        )  # fmt: skip

    def prompts(self, row: int, words: bool, scenes: bool) -> list[str]:
        """One for each picture of a person."""
        identity = self.people[row] if words else None
        rng = np.random.default_rng(self.word_seeds[row])
        shown = self.scenes[row] if scenes else [None] * EACH
        if identity is None and not scenes:
            return [captions.COARSE] * EACH
        return [captions.fine_caption(identity, attributes, rng) for attributes in shown]

    @torch.no_grad()
    def draw(
        self, method: Method, scenes: bool, guidance: float | HybridGuidance = SCENE_GUIDANCE
    ) -> np.ndarray:
        """uint8 [people x EACH, 64, 64, 3]; with guidance where scenes are asked for."""
        latents: list[Tensor] = []
        for row in range(len(self.people)):
            prompted = self.base.prompts(self.prompts(row, method.words, scenes))
            latents.append(self._sampled(method, row, prompted, guidance if scenes else 1.0))
        return to_pictures(decode(self.base.vae, torch.cat(latents)))

    def _sampled(
        self, method: Method, row: int, prompted: Prompted, guidance: float | HybridGuidance
    ) -> Tensor:
        def run() -> Tensor:
            return sample(self.unet, self.noise[row], prompted, self.base.scheduler, guidance=guidance)

        if method.loras is None:
            return run()
        lora = method.loras[row : row + 1]
        if isinstance(guidance, HybridGuidance):  # the base's two passes first
            lora = lora.map(lambda factor: torch.cat([torch.zeros_like(factor)] * 2 + [factor]))
        with injected(self.modules, *by_name(self.groups, lora)):
            return run()

    def measure(self, method: Method) -> dict:
        """Figures under the coarse prompt, and under "scenes" those of prompts that ask for one."""
        found = of_people(self.reader, self.draw(method, scenes=False), self.people, EACH)
        return found | {"scenes": self.in_scenes(method)}

    def in_scenes(self, method: Method, guidance: float | HybridGuidance = SCENE_GUIDANCE) -> dict:
        """Figures in scenes that a prompt asks for; "attributes_right": how much of the scene came."""
        shown = self.draw(method, scenes=True, guidance=guidance)
        wanted = np.array([scene.indices() for scenes in self.scenes for scene in scenes])
        right = self.reader.read(shown).attributes == wanted
        return of_people(self.reader, shown, self.people, EACH) | {"attributes_right": float(right.mean())}


def methods(
    hypernetwork: Hypernetwork,
    end_to_end: Hypernetwork | None,
    data: FolderTasks,
    known: LoRADataset,
    wanted: LoRADataset,
) -> list[Method]:
    """The rows; the baselines are told the true factors, the hypernetworks see one picture."""
    rng = np.random.default_rng(_SEED)
    told = [data.plain_condition(task, rng) for task in wanted.tasks]
    indices = [
        torch.tensor([person(task.id).indices() for task in dataset.tasks]) for dataset in (known, wanted)
    ]
    found = [
        Method("base", None),
        Method("base, the person in words", None, words=True),
        Method("mean LoRA", mean_lora(known.loras, len(wanted.tasks))),
        Method("nearest LoRA", nearest_lora(known.loras, *indices)),
        Method("ridge regression", ridge_lora(known.loras, *indices)),
        Method("LoFA", predicted_factors(hypernetwork, data, told)),
        Method("per-person LoRA", wanted.loras),
    ]
    if end_to_end is not None:
        found.insert(-1, Method("end to end", predicted_factors(end_to_end, data, told)))
    return found


def seconds(
    hypernetwork: Hypernetwork, data: FolderTasks, wanted: LoRADataset, config: TrainingConfig
) -> dict[str, float]:
    """What one person's LoRA takes on this machine: predicted (median of five), trained (once)."""
    condition = data.plain_condition(wanted.tasks[0], np.random.default_rng(_SEED))
    predicted = []
    for _ in range(6):  # the first warms up
        started = time.perf_counter()
        predicted_factors(hypernetwork, data, [condition])
        predicted.append(time.perf_counter() - started)
    task = wanted.tasks[0]
    started = time.perf_counter()
    train_loras(
        data.load_denoiser(), data.weights.model.layers, {task.id: data.latents_of(task)}, data.coarse(),
        config.lora,
    )  # fmt: skip
    return {"LoFA": statistics.median(predicted[1:]), "per-person LoRA": time.perf_counter() - started}


def shown_people(studio: Studio, data: FolderTasks, wanted: LoRADataset, rows: list[Method]) -> Image.Image:
    """The first people: the one picture that was given, then what three methods draw in the same scenes."""
    drawn = {
        name: next(studio.draw(method, scenes=True) for method in rows if method.name == name)
        for name in ("base", "LoFA", "per-person LoRA")
    }
    strips = []
    for row in range(SHOWN):
        given = np.full((world.SIZE, EACH * world.SIZE, 3), 255, np.uint8)
        # Its task's first picture, which plain_condition takes.
        given[:, : world.SIZE] = Image.open(Path(data.config.folder) / wanted.tasks[row].id / "00.png")
        strips.append((f"given: one picture of {wanted.tasks[row]}", given))
        for name, pictures in drawn.items():
            strips.append((name, np.concatenate(list(pictures[row * EACH : (row + 1) * EACH]), 1)))
    return sheet(strips)


def evaluate(
    config: TrainingConfig,
    hypernetwork: Hypernetwork,
    console: Console,
    picture: Path | None = None,
    end_to_end: Hypernetwork | None = None,
) -> dict:
    """All rows, those that are guided by HM-CFG, and seconds; `picture`: where to draw some of the people, if
    anywhere; `end_to_end`: a second hypernetwork, trained from pictures alone.
    """
    folder = Path(config.out)
    data = FolderTasks(config.data, folder, Path(config.base))
    groups = names_by_shape(hypernetwork)
    known = LoRAFolder(folder / "loras_training").load(groups, data.training)
    wanted = LoRAFolder(folder / "loras_held_out").load(groups, data.held_out)
    people = [person(task.id) for task in wanted.tasks]
    studio = Studio(Base(Path(config.base)), data.load_denoiser(), people, groups)
    rows, rows_shown = {}, methods(hypernetwork, end_to_end, data, known, wanted)
    if picture:
        shown_people(studio, data, wanted, rows_shown).save(picture, optimize=True)
        console.print(f"wrote {picture}")
    for method in rows_shown:
        rows[method.name] = studio.measure(method)
        shown = {key: value for key, value in rows[method.name].items() if isinstance(value, float)}
        console.print(method.name, {key: round(value, 3) for key, value in shown.items()})
    hybrid = []
    for method in (
        method for method in rows_shown if method.name in ("LoFA", "end to end", "per-person LoRA")
    ):
        for guidance in HYBRID:
            weights = {"method": method.name, "w_base": guidance.w_base, "w_subject": guidance.w_subject}
            hybrid.append(weights | studio.in_scenes(method, guidance))
    return {
        "people": len(wanted.tasks),
        "each": EACH,
        "rows": rows,
        "scene_guidance": SCENE_GUIDANCE,
        "hybrid": hybrid,
        "seconds": seconds(hypernetwork, data, wanted, config),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", type=Path, default=Path("training/configs/faces_identity.toml"))
    parser.add_argument("--hypernetwork", type=Path, help="default: the run's")
    parser.add_argument("--end-to-end", type=Path, help="a second hypernetwork, judged beside it")
    parser.add_argument("--sheet", type=Path, help="also draw some of the people into this PNG")
    chosen = parser.parse_intermixed_args()
    config = load_config(chosen.config, chosen.overrides)
    folder = Path(config.out)
    torch.set_num_threads(1)
    network = load_hypernetwork(chosen.hypernetwork or folder / "hypernetwork.safetensors")
    other = load_hypernetwork(chosen.end_to_end) if chosen.end_to_end else None
    found = {
        "identity": evaluate(config, network, Console(stderr=True, highlight=False), chosen.sheet, other)
    }
    write_whole(folder / "evaluation.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
