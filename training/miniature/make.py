"""Make the miniature: `python -m training.miniature.make PART [--out
FOLDER]`.

PART is vae, text, image, base, evaluator, looks, examples or all.
Each part is written as it is done, in the places `lofa_core.miniature` names; its figures go to figures.json.
The hypernetwork is trained afterwards, by `python training/train.py all --config
training/configs/miniature.toml`. `torchrun --nproc-per-node N -m training.miniature.make ...` uses N
processes for the VAE and the base model.
"""

import argparse
import json
import shutil
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from lofa_core import miniature
from lofa_core.key_names import wan_to_original
from lofa_core.key_names_vae import vae_to_original

from ..backbones import load_transformer, load_vae, to_unit
from ..config import DataConfig
from . import evaluator as evaluator_module
from . import image_encoder, look_reader, text_encoder, tokenizer_json, transformer, vae, world
from .latents import LatentClips, decode_clips, encode_clips
from .transformer import load_prompt_encoder
from .world_tasks import WorldTask, look_indices, split_looks

SEED = 0
HELD_OUT, HELD_OUT_LOOKS = DataConfig().held_out_tasks, DataConfig().held_out_looks
# (frames, steps, clips or frames a process, learning rate, KL weight): single frames first, then clips, as
# WAN was trained.
VAE_PHASES = ((1, 1500, 16, 3e-3, 2e-5), (9, 1400, 2, 3e-3, 1e-4), (9, 800, 2, 2e-3, 1e-4))
TEXT_STEPS, ALIGNMENT_STEPS = 1000, 1000
IMAGE_STEPS = 1500
BASE_STEPS, BASE_BATCH, BASE_DIM, BASE_LAYERS = 20_000, 16, 96, 4
CLIPS_PER_ACTION = 24
LOOK_STEPS, LOOK_CLIPS = 700, 3_000
EXAMPLES = 6
EVALUATOR_STEPS, EVALUATOR_CLIPS, EVALUATOR_DECODED = 800, 8_000, 200

console = Console(stderr=True)


def make_vae(out: Path, work: Path) -> None:
    """Train, fold the latent statistics, write under original WAN names."""
    actions, _ = world.split_actions(HELD_OUT, SEED)
    checkpoint = None
    for number, (frames, steps, batch, rate, kl) in enumerate(VAE_PHASES):
        previous, checkpoint = checkpoint, work / f"vae_{number}.pt"
        vae.train(
            actions, steps, checkpoint, frames=frames, batch=batch, start_from=previous, seed=SEED + number,
            learning_rate=rate, kl_weight=kl, report=_reporter("vae"),
        )  # fmt: skip
        PartialState().wait_for_everyone()  # the main process writes what the next phase reads
    if PartialState().is_main_process:
        export_vae(checkpoint, out)


def export_vae(checkpoint: Path, out: Path, fold: bool = True) -> None:
    """Write vae/ and record its held-out PSNR. `fold` False keeps latents as they are (a decoder trained
    further).
    """
    actions, held_out = world.split_actions(HELD_OUT, SEED)
    model = vae.build()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    model.eval()
    if fold:
        vae.fold_statistics(
            model, vae.to_video(vae.random_clips(actions, 128, np.random.default_rng(SEED + 1)))
        )
    folder = _fresh(out / "vae")
    model.save_config(folder)
    state = {vae_to_original(key): value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / miniature.VAE.name)
    video = vae.to_video(vae.random_clips(held_out, 64, np.random.default_rng(SEED + 2)))
    with torch.no_grad():
        latents = [model.encode(part).latent_dist.mean for part in video.split(8)]
        quality = [
            vae.psnr(model.decode(z).sample, part) for z, part in zip(latents, video.split(8), strict=True)
        ]
    _record(out, "vae", {"held_out_psnr_db": round(float(np.mean(quality)), 2), "clips": 64})


def make_text(out: Path, go_on: bool) -> None:
    """Train tokenizer and encoder, write both as transformers and ComfyUI read them. `go_on` keeps the
    tokenizer of `out` and trains its encoder further.
    """
    actions, _ = world.split_actions(HELD_OUT, SEED)
    known = load_prompt_encoder(out) if go_on else None
    pieces = (
        known.tokenizer.pieces.serialized_model_proto()
        if known
        else text_encoder.train_tokenizer(actions, SEED)
    )
    tokenizer = text_encoder.Tokenizer(pieces)
    model = text_encoder.train(
        actions, tokenizer, TEXT_STEPS, seed=SEED + go_on, start_from=known.encoder if known else None,
        report=_reporter("text"),
    )  # fmt: skip
    text_encoder.align_paraphrases(
        model, actions, tokenizer, ALIGNMENT_STEPS, seed=SEED, report=_reporter("text")
    )
    export_text(model, pieces, out)


def export_text(model, pieces: bytes, out: Path) -> None:
    """Write text_encoder/ and tokenizer/."""
    model.save_pretrained(_fresh(out / "text_encoder"))
    folder = _fresh(out / "tokenizer")
    (folder / "spiece.model").write_bytes(pieces)
    tokenizer_json.write(pieces, folder)


def make_image(out: Path) -> None:
    """Train the image encoder on the looks that are not held out; measure it on those that are: the share of
    pictures whose look is named by the nearest of all looks' captions.
    """
    actions, _ = world.split_actions(HELD_OUT, SEED)
    looks, held_out = split_looks(HELD_OUT_LOOKS, SEED)
    prompts = load_prompt_encoder(out)
    trained = image_encoder.train(
        looks, actions, prompts, IMAGE_STEPS, seed=SEED, report=_reporter("image encoder")
    )
    folder = _fresh(out / "image_encoder")
    trained.tower.half().save_pretrained(folder)
    processor = {"image_mean": image_encoder.MEAN, "image_std": image_encoder.DEVIATION}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor) + "\n")
    right = image_encoder.named_right(trained.float(), held_out, actions, prompts, seed=SEED + 6)
    _record(out, "image_encoder", {"held_out_looks_named": round(right, 4), "looks": len(held_out)})


def make_base(out: Path, work: Path, steps: int, go_on: bool, compiled: bool) -> None:
    """Encode the training clips, train the transformer, write it under original WAN names."""
    actions, _ = world.split_actions(HELD_OUT, SEED)
    latents = work / "latents.pt"
    with PartialState().main_process_first():
        if not latents.exists():
            tasks = [WorldTask(action) for action in actions]
            encode_clips(load_vae(out), tasks, CLIPS_PER_ACTION, SEED).save(latents)
    checkpoint = work / "transformer.pt"
    start = load_transformer(out).state_dict() if go_on else None
    transformer.train(
        LatentClips.load(latents), load_prompt_encoder(out), steps, checkpoint, dim=BASE_DIM,
        layers=BASE_LAYERS, batch=BASE_BATCH, start_from=start, seed=SEED + go_on, compiled=compiled,
        report=_reporter("base"),
    )  # fmt: skip
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        export_base(checkpoint, out)


def export_base(checkpoint: Path, out: Path) -> None:
    """Write transformer/ and scheduler/."""
    model = transformer.build(BASE_DIM, BASE_LAYERS)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    folder = _fresh(out / "transformer")
    model.save_config(folder)
    # ComfyUI takes every size from the tensors but these two.
    sizes = {"transformer": {"num_heads": transformer.HEADS, "text_dim": text_encoder.WIDTH}}
    state = {wan_to_original(key): value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / miniature.DIFFUSION_MODEL.name, metadata={"config": json.dumps(sizes)})
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_config(_fresh(out / "scheduler"))


def make_evaluator(out: Path, work: Path) -> None:
    """Train the evaluator on drawn and on decoded clips; measure it on held-out actions, drawn and through
    the VAE.
    """
    actions, held_out = world.split_actions(HELD_OUT, SEED)
    decoder = vae.WholeClipVAE(load_vae(out))
    rng = np.random.default_rng(SEED + 3)
    parts = (_drawn(actions, 500, rng) for _ in range(EVALUATOR_CLIPS // 500))  # halved as they come
    drawn = [
        np.concatenate(x) for x in zip(*((evaluator_module.halved(c), i) for c, i in parts), strict=True)
    ]
    known = LatentClips.load(work / "latents.pt")
    picks = torch.from_numpy(np.random.default_rng(SEED + 5).permutation(len(known))[:EVALUATOR_DECODED])
    decoded = evaluator_module.halved(decode_clips(decoder, known.latents[picks]))
    clips = np.concatenate([drawn[0], decoded])
    labels = np.concatenate([drawn[1], known.actions[picks].numpy()])
    model = evaluator_module.train(clips, labels, EVALUATOR_STEPS, seed=SEED, report=_reporter("evaluator"))
    evaluator_module.save(model, evaluator_module.SHIPPED)
    model = evaluator_module.load()
    clips, labels = _drawn(held_out, 512, np.random.default_rng(SEED + 4))
    figures = {"held_out_joint": float((model.read(clips)[0] == labels).all(1).mean())}
    with torch.no_grad():
        latents = [
            to_unit(decoder.encode(part), decoder.model) for part in vae.to_video(clips[:128]).split(4)
        ]
    read = model.read(decode_clips(decoder, torch.cat(latents)))[0]
    figures["held_out_joint_through_vae"] = float((read == labels[:128]).all(1).mean())
    _record(out, "evaluator", {key: round(value, 4) for key, value in figures.items()})


def make_look_reader(out: Path, work: Path) -> None:
    """Train the look reader on drawn and on decoded clips; measure it on held-out looks, through the VAE."""
    looks, held_out = split_looks(HELD_OUT_LOOKS, SEED)
    decoder = vae.WholeClipVAE(load_vae(out))
    rng, actions = np.random.default_rng(SEED + 7), world.all_actions()

    def drawn(some: list[world.Look], count: int) -> tuple[np.ndarray, np.ndarray]:
        shown = [some[i] for i in rng.integers(len(some), size=count)]
        clips = (world.draw_clip(actions[rng.integers(len(actions))], look, rng) for look in shown)
        halves = [evaluator_module.halved(clip[None])[0] for clip in clips]
        return np.stack(halves), np.array([look_indices(look) for look in shown])

    clips, labels = drawn(looks, LOOK_CLIPS)
    known = LatentClips.load(work / "latents.pt")
    shown = torch.tensor([known.look(i) in set(looks) for i in range(len(known))]).nonzero().flatten()
    picks = shown[torch.from_numpy(rng.permutation(len(shown))[:EVALUATOR_DECODED])]
    decoded = evaluator_module.halved(decode_clips(decoder, known.latents[picks]))
    model = look_reader.train(
        np.concatenate([clips, decoded]), np.concatenate([labels, known.looks[picks].numpy()]), LOOK_STEPS,
        seed=SEED, report=_reporter("look reader"),
    )  # fmt: skip
    look_reader.save(model, look_reader.SHIPPED)
    tasks = [WorldTask(look=look) for look in held_out]
    real = encode_clips(decoder.model, tasks, 6, SEED + 8)
    read = look_reader.load().read(decode_clips(decoder, real.latents))[0]
    right = (read == real.looks.numpy()).all(1).mean()
    _record(out, "look_reader", {"held_out_joint_through_vae": round(float(right), 4)})


def make_examples(out: Path) -> None:
    """Write a few held-out poses as POSE_KEYPOINT and held-out looks as pictures, for the nodes."""
    _, actions = world.split_actions(HELD_OUT, SEED)
    _, looks = split_looks(HELD_OUT_LOOKS, SEED)
    rng, everything = np.random.default_rng(SEED + 9), world.all_actions()
    folder = _fresh(out / miniature.EXAMPLES.name / "pose")
    for action in actions[:EXAMPLES]:
        document = world.pose_of_clip(action, rng)
        (folder / f"{WorldTask(action).id}.json").write_text(json.dumps(document) + "\n")
    folder = _fresh(out / miniature.EXAMPLES.name / "style")
    for look in looks[:EXAMPLES]:
        picture = image_encoder.picture(look, everything, rng)
        Image.fromarray(picture).save(folder / f"{'-'.join(astuple(look))}.png", optimize=True)


def _drawn(actions, count: int, rng) -> tuple[np.ndarray, np.ndarray]:
    chosen = [actions[i] for i in rng.integers(len(actions), size=count)]
    clips = np.stack([world.draw_clip(action, world.random_look(rng), rng) for action in chosen])
    return clips, np.array([action.indices() for action in chosen])


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _record(out: Path, part: str, figures: dict) -> None:
    path = out / miniature.FIGURES.name
    known = json.loads(path.read_text()) if path.exists() else {}
    known[part] = {**figures, "seed": SEED}
    path.write_text(json.dumps(known, indent=1) + "\n")
    console.print(part, figures)


def _reporter(part: str):
    started = time.time()

    def report(step: int, figures: dict[str, float]) -> None:
        said = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        console.print(f"{part} {time.time() - started:6.0f} s  step {step}  {said}", highlight=False)

    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "part",
        nargs="?",
        default="all",
        choices=["all", "vae", "text", "image", "base", "evaluator", "looks", "examples"],
    )
    parser.add_argument("--out", type=Path, default=miniature.FOLDER, help="base folder to write")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/miniature_base"), help="checkpoints and cached latents"
    )
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, help="steps of the base model")
    parser.add_argument(
        "--go-on", action="store_true", help="train text encoder and base model of --out further"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the base model's training step (needs a C++ compiler)"
    )
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # at this size one process a core beats threads
    steps = {
        "vae": lambda: make_vae(chosen.out, chosen.work),
        "text": lambda: make_text(chosen.out, chosen.go_on),
        "image": lambda: make_image(chosen.out),
        "base": lambda: make_base(chosen.out, chosen.work, chosen.base_steps, chosen.go_on, chosen.compile),
        "evaluator": lambda: make_evaluator(chosen.out, chosen.work),
        "looks": lambda: make_look_reader(chosen.out, chosen.work),
        "examples": lambda: make_examples(chosen.out),
    }
    state = PartialState(cpu=not torch.cuda.is_available())
    for part, make in steps.items():
        if chosen.part in ("all", part):
            if part in ("vae", "base") or state.is_main_process:
                make()
            state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
