"""Make the second miniature: `python -m training.faces.make [all | vae | clip | evaluator | base] [--out
FOLDER]`.

Each part is written as it is done, in the folders that diffusers' and transformers' own classes read; figures
and seeds go to figures.json. A killed run goes on from the checkpoints in `--work`.
"""

import argparse
import json
import shutil
import time
from functools import cached_property
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler
from rich.console import Console
from transformers import CLIPTextModel

from . import base, clip, evaluator, figures, vae, world
from .data import cached_latents
from .model import SCHEDULE, TEXT_WIDTHS, Base, build_unet
from .portraits import Portraits, random_portraits

SEED = 0
HELD_OUT = 256
PEOPLE, EACH = 12_000, 2
VAE_STEPS, CLIP_STEPS, BASE_STEPS, EVALUATOR_STEPS = 1600, 2000, 3500, 1000
DEFAULT = Path(__file__).with_name("model")

console = Console(stderr=True)


class Made:
    """A base folder in the making: `out` is shipped, `work` holds checkpoints and what is drawn once."""

    def __init__(self, out: Path, work: Path):
        self.out, self.work = out, work
        self.training, self.held_out = world.split_identities(HELD_OUT, SEED)

    @cached_property
    def portraits(self) -> Portraits:
        """Portraits of training identities, drawn once."""
        path = self.work / "portraits.pt"
        if not path.exists():
            random_portraits(self.training, PEOPLE, EACH, SEED).save(path)
        return Portraits.load(path)

    @cached_property
    def unseen(self) -> Portraits:
        """Two portraits of every held-out identity."""
        return random_portraits(self.held_out, HELD_OUT, EACH, SEED + 1)

    def vae(self, steps: int) -> None:
        model = vae.train(self.portraits, steps, self.work / "vae.pt", seed=SEED, report=_reporter("vae"))
        self._save(model, "vae")
        (self.work / "latents.pt").unlink(missing_ok=True)  # of a VAE before this one
        self._record("vae", {"steps": steps, **figures.of_vae(Base(self.out).vae, self.unseen)})

    def clip(self, steps: int) -> None:
        """Writes text_encoder/, text_encoder_2/, both tokenizers and image_encoder/."""
        tokenizer = clip.train_tokenizer(SEED)
        towers = clip.train(
            self.portraits, tokenizer, steps, self.work / "clip.pt", seed=SEED, report=_reporter("clip")
        )
        for folder in ("tokenizer", "tokenizer_2"):
            tokenizer.save_pretrained(_fresh(self.out / folder))
        first = CLIPTextModel(towers.texts[0].config)  # as SDXL, without the projection
        first.load_state_dict(towers.texts[0].text_model.state_dict())
        self._save(first, "text_encoder")
        self._save(towers.texts[1], "text_encoder_2")
        self._save(towers.image, "image_encoder")
        made = figures.of_clip(Base(self.out), self.portraits, self.unseen)
        self._record("clip", {"steps": steps, "text_widths": list(TEXT_WIDTHS), **made})

    def base(self, steps: int) -> None:
        """Writes unet/, scheduler/ and model_index.json."""
        known = Base(self.out)
        latents = cached_latents(known.vae, self.portraits, self.work / "latents.pt")
        base.train(
            self.portraits, latents, known.prompts, steps, self.work / "base.pt", seed=SEED,
            report=_reporter("base"),
        )  # fmt: skip
        self.export_base()

    def export_base(self) -> None:
        """Write the averaged weights of the checkpoint, be it finished or not."""
        known = torch.load(self.work / "base.pt", weights_only=True)
        unet = build_unet()
        unet.load_state_dict(known["average"])
        self._save(unet, "unet")
        EulerDiscreteScheduler(
            **SCHEDULE, timestep_spacing="leading", steps_offset=1, prediction_type="epsilon"
        ).save_pretrained(_fresh(self.out / "scheduler"))
        (self.out / "model_index.json").write_text(json.dumps(_INDEX, indent=1) + "\n")
        made = {"steps": known["step"], "noise_loss": round(known["running"], 4)}
        if (self.out / "evaluator.safetensors").exists():
            reader = evaluator.load(self.out / "evaluator.safetensors")
            made |= figures.of_base(Base(self.out), reader, self.held_out, SEED)
        self._record("base", made)

    def evaluator(self, steps: int) -> None:
        """Trained on drawn portraits and on a quarter of them through the VAE."""
        pixels, portraits = self.portraits.pixels, self.portraits
        through = len(portraits) // 4
        latents = cached_latents(Base(self.out).vae, portraits, self.work / "latents.pt")[:through]
        pixels = torch.cat([figures.pictures(Base(self.out).vae, latents), pixels[through:]])
        model = evaluator.train(pixels, portraits, steps, seed=SEED, report=_reporter("evaluator"))
        evaluator.save(model, self.out / "evaluator.safetensors")
        model = evaluator.load(self.out / "evaluator.safetensors")
        made = figures.of_evaluator(model, Base(self.out).vae, self.unseen)
        self._record("evaluator", {"steps": steps, **made})

    def _save(self, model, part: str) -> None:
        model.half().save_pretrained(_fresh(self.out / part))

    def _record(self, part: str, made: dict) -> None:
        path = self.out / "figures.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in made.items()}
        known[part] = {**rounded, "seed": SEED}
        path.write_text(json.dumps(known, indent=1) + "\n")
        console.print(part, known[part])


# What StableDiffusionXLPipeline.from_pretrained reads first.
_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _reporter(part: str):
    started = time.time()

    def report(step: int, made: dict[str, float]) -> None:
        said = "  ".join(f"{name} {value:.4f}" for name, value in made.items())
        console.print(f"{part} {time.time() - started:6.0f} s  step {step}  {said}", highlight=False)

    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"vae": VAE_STEPS, "clip": CLIP_STEPS, "evaluator": EVALUATOR_STEPS, "base": BASE_STEPS}
    parser.add_argument("part", nargs="?", default="all", choices=["all", *parts])
    parser.add_argument("--out", type=Path, default=DEFAULT, help="base folder to write")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/faces"), help="checkpoints, what is drawn once"
    )
    parser.add_argument("--steps", type=int, help="of the one part named, instead of its own number")
    parser.add_argument("--export", action="store_true", help="write the base as its checkpoint has it now")
    chosen = parser.parse_args()
    if chosen.steps and chosen.part == "all":
        parser.error("--steps needs the name of one part")
    chosen.out.mkdir(parents=True, exist_ok=True)
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # at this size one process a core beats threads
    made = Made(chosen.out, chosen.work)
    if chosen.export:
        return made.export_base()
    for part, steps in parts.items():
        if chosen.part in ("all", part):
            getattr(made, part)(chosen.steps or steps)


if __name__ == "__main__":
    main()
