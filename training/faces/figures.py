"""The figures that are reported of each part of the second miniature."""

import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lofa_core.metrics.distances import frechet_distance

from . import captions, world
from .data import coarse, latents_of
from .evaluator import Evaluator, diversity, identity_similarity
from .model import Base, image_states
from .portraits import Portraits, draw_portraits, to_pictures, to_pixels
from .vae import decode, psnr


def pictures(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents -> uint8 pictures [N, 64, 64, 3]."""
    return torch.from_numpy(to_pictures(decode(vae, latents)))


def of_vae(vae: AutoencoderKL, unseen: Portraits) -> dict:
    rebuilt = decode(vae, latents_of(vae, unseen))
    return {
        "held_out_psnr_db": psnr(rebuilt, to_pixels(unseen.pixels)),
        "scaling_factor": vae.config.scaling_factor,
        "pictures": len(unseen),
    }


def of_clip(base: Base, seen: Portraits, unseen: Portraits, count: int = 6000) -> dict:
    """How often the right one of 64 captions is found, and a linear probe of all 65 image states."""
    rng = np.random.default_rng(3)
    texts = [
        captions.fine_caption(unseen.identity(i), unseen.attributes_of(i), rng) for i in range(len(unseen))
    ]
    with torch.no_grad():
        said = torch.cat([base.prompts(texts[i : i + 64]).pooled for i in range(0, len(texts), 64)])
        shown = torch.cat(
            [base.image_encoder(pixel_values=to_pixels(p)).image_embeds for p in unseen.pixels.split(64)]
        )
        logits = torch.nn.functional.normalize(shown, dim=-1) @ torch.nn.functional.normalize(said, dim=-1).T
        found = [block.argmax(1) == torch.arange(len(block)) for block in _diagonal_blocks(logits, 64)]
        states, unseen_states = (
            torch.cat([image_states(base.image_encoder, part).flatten(1) for part in pixels.split(64)])
            for pixels in (seen.pixels[:count], unseen.pixels)
        )
    right, error = _linear_probe(states, seen, unseen_states, unseen)
    return {
        "right_caption_of_64": float(torch.cat(found).float().mean()),
        "linear_probe": dict(zip(world.FACTORS, [round(r, 3) for r in right], strict=True)),
        "linear_probe_mean": float(np.mean(right)),
        "linear_probe_proportions_r2": 1.0 - error,
    }


def _diagonal_blocks(square: Tensor, size: int) -> list[Tensor]:
    return [square[i : i + size, i : i + size] for i in range(0, len(square) - size + 1, size)]


def _linear_probe(
    states: Tensor, seen: Portraits, unseen_states: Tensor, unseen: Portraits
) -> tuple[list[float], float]:
    """Ridge regression to one-hot factors and to proportions: (share right by factor, error / variance)."""
    mean, deviation = states.mean(0), states.std(0).clamp(min=1e-6)

    def inputs(x: Tensor) -> Tensor:
        return torch.cat([(x - mean) / deviation, torch.ones(len(x), 1)], 1).double()

    x, held_out = inputs(states), inputs(unseen_states)
    ridge = 0.05 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    solve = torch.linalg.solve(x.T @ x + ridge, x.T)
    right = []
    for column, values in enumerate(world.FACTORS.values()):
        wanted = torch.nn.functional.one_hot(seen.factors[: len(x), column], len(values)).double()
        read = (held_out @ (solve @ wanted)).argmax(1)
        right.append(float((read == unseen.factors[:, column]).float().mean()))
    measured = held_out @ (solve @ seen.proportions[: len(x)].double())
    error = (measured - unseen.proportions).pow(2).mean() / unseen.proportions.var(0).mean()
    return right, float(error)


def of_evaluator(reader: Evaluator, vae: AutoencoderKL, unseen: Portraits) -> dict:
    """Held-out portraits as drawn and through the VAE; how alike two pictures of one, of two people are."""
    made = {}
    for name, shown in (("", unseen.pixels), ("_through_vae", pictures(vae, latents_of(vae, unseen)))):
        reading = reader.read(shown)
        right = reading.factors == unseen.factors.numpy()
        wrong = reading.proportions - unseen.proportions.numpy()
        made |= {
            f"factors_right{name}": float(right.mean()),
            f"all_factors_right{name}": float(right.all(1).mean()),
            f"proportions_r2{name}": 1.0 - float((wrong**2).mean() / unseen.proportions.var(0).mean()),
            f"attributes_right{name}": float((reading.attributes == unseen.attributes.numpy()).mean()),
        }
    first, second = reading.identity[0::2], reading.identity[1::2]
    made["similarity_same_person"] = _mean_cosine(first, second)
    made["similarity_other_person"] = _mean_cosine(first, np.roll(second, 1, axis=0))
    return made


def _mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).mean())


def of_people(reader: Evaluator, shown: np.ndarray, people: list[world.Identity], each: int) -> dict:
    """Figures of generated pictures, `each` of every person in turn, beside as many drawn ones."""
    real = draw_portraits(people, each, seed=77)
    wanted, known = reader.read(shown), reader.read(real.pixels)
    rows = [slice(i, i + each) for i in range(0, len(shown), each)]
    right = wanted.factors == real.factors.numpy()
    wrong = wanted.proportions - real.proportions.numpy()
    return {
        "factors_right": dict(zip(world.FACTORS, right.mean(0).round(3).tolist(), strict=True)),
        "factors_right_mean": float(right.mean()),
        "all_factors_right": float(right.all(1).mean()),
        "proportions_r2": 1.0 - float((wrong**2).mean() / real.proportions.var(0).mean()),
        "identity_similarity": float(
            np.mean([identity_similarity(wanted.identity[r], known.identity[r]) for r in rows])
        ),
        "diversity": float(np.mean([diversity(wanted.free[r]) for r in rows])),
        "diversity_real": float(np.mean([diversity(known.free[r]) for r in rows])),
        "frechet": frechet_distance(
            np.concatenate([wanted.identity, wanted.free], 1), np.concatenate([known.identity, known.free], 1)
        ),
    }


def of_base(base: Base, reader: Evaluator, held_out: list[world.Identity], seed: int, each: int = 4) -> dict:
    """Held-out people under fine captions and, as a floor, under the coarse prompt; guidance 3, 20 steps."""
    people = held_out[:32]
    rng = np.random.default_rng([seed, 4])
    shown = [world.random_attributes(rng) for _ in range(len(people) * each)]
    texts = [captions.fine_caption(people[i // each], attributes, rng) for i, attributes in enumerate(shown)]
    started = time.time()
    fine = base.paint(base.prompts(texts), seed)
    seconds = (time.time() - started) / len(fine)
    read = reader.read(fine).attributes
    wanted = np.array([attributes.indices() for attributes in shown])
    alone = base.paint(coarse(base.prompts, len(fine)), seed, guidance=1.0)
    return {
        "seconds_a_picture": seconds,
        "fine": {**of_people(reader, fine, people, each), "attributes_right": float((read == wanted).mean())},
        "coarse": of_people(reader, alone, people, each),
        "coarse_values_shown": _values_shown(reader.read(alone).factors),
    }


def _values_shown(factors: np.ndarray) -> dict[str, list[float]]:
    """The share of pictures that show each value of every factor."""
    return {
        name: (np.bincount(factors[:, i], minlength=len(values)) / len(factors)).round(3).tolist()
        for i, (name, values) in enumerate(world.FACTORS.items())
    }
