"""CLIP for the world: a tokenizer, two text encoders and an image encoder, trained together on portraits.

To the contrast between the pictures and captions of a batch comes a read-out: what a caption says, and what a
portrait shows, must be legible in the penultimate states, which are all that the UNet and the hypernetwork
see. A few hundred captions a batch would be told apart by hair and place alone; noses would never be learned.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from ..optimisers import MuonAdamW, set_learning_rate, warm_up_and_cosine
from . import captions, checkpoints, world
from .model import IMAGE_WIDTH, TEXT_WIDTHS, TOKENS, build_image_encoder, build_text_encoders, tokenise
from .portraits import Portraits, to_pixels

NAMES = {**world.FACTORS, **world.ATTRIBUTES}
_VOCABULARY = 512


def train_tokenizer(seed: int = 0, sentences: int = 5_000) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a vocabulary learned from captions."""
    rng = np.random.default_rng(seed)
    people = world.all_identities()
    draws = ((people[int(rng.integers(len(people)))], world.random_attributes(rng)) for _ in range(sentences))
    corpus = (captions.fine_caption(*pair, rng) for pair in draws)
    blank = CLIPTokenizer()  # for its normaliser and its way of finding words
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    letters = list("abcdefghijklmnopqrstuvwxyz,.'-")
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False,
            special_tokens=[],
        ),
    )  # fmt: skip
    vocabulary = learner.get_vocab()
    for letter in letters:  # a letter that ends a word is a token of its own
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


class _ReadOut(nn.Module):
    """For each thing to be read, one attention query over the states and a linear map to `sizes` outputs."""

    def __init__(self, width: int, sizes: list[int]):
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(sizes), width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList([nn.Linear(width, size) for size in sizes])

    def forward(self, states: Tensor) -> list[Tensor]:
        """Outputs [B, size] for states [B, S, width]."""
        states = self.norm(states)
        pooled = torch.einsum("fd,bsd->bfs", self.query, states).softmax(-1) @ states
        return [head(pooled[:, i]) for i, head in enumerate(self.heads)]


class Towers(nn.Module):
    """Both text encoders and the image encoder, with what is needed to train them only."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.texts = nn.ModuleList(build_text_encoders(tokenizer))
        self.image = build_image_encoder()
        sizes = [len(values) for values in NAMES.values()]
        said = [size + 1 for size in sizes]  # the last: unsaid
        self.text_read_outs = nn.ModuleList([_ReadOut(width, said) for width in TEXT_WIDTHS])
        self.image_read_out = _ReadOut(IMAGE_WIDTH, sizes + [1] * len(world.PROPORTIONS))
        self.scales = nn.Parameter(torch.full((len(TEXT_WIDTHS),), 2.0))  # logarithms, as CLIP's

    def losses(self, tokens: Tensor, said: Tensor, pixels: Tensor, shown: Tensor, proportions: Tensor):
        """Losses by name for tokens [B, S], said and shown values [B, 13] (said may be "unsaid"), pixels
        [B, 3, 64, 64] and proportions [B, 3]; and the share of values read right from text and picture."""
        image = self.image(pixel_values=pixels, output_hidden_states=True)
        seen = F.normalize(image.image_embeds, dim=-1)
        pairs = torch.arange(len(tokens))
        contrast, read, right = 0.0, 0.0, {}
        for number, (model, read_out) in enumerate(zip(self.texts, self.text_read_outs, strict=True)):
            text = model(tokens, output_hidden_states=True)
            logits = self.scales[number].exp() * F.normalize(text.text_embeds, dim=-1) @ seen.T
            contrast = contrast + F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)
            loss, right[f"text_{number + 1}"] = _classified(read_out(text.hidden_states[-2]), said)
            read = read + loss
        outputs = self.image_read_out(image.hidden_states[-2])
        seen_loss, right["image"] = _classified(outputs[: len(NAMES)], shown)
        measures = F.mse_loss(torch.cat(outputs[len(NAMES) :], 1), proportions)
        losses = {"contrast": contrast / 4, "text": read, "image": seen_loss, "proportions": measures}
        return losses, right


def _classified(logits: list[Tensor], wanted: Tensor) -> tuple[Tensor, float]:
    loss = sum(F.cross_entropy(row, wanted[:, i]) for i, row in enumerate(logits)) / len(logits)
    right = torch.stack([row.argmax(-1) == wanted[:, i] for i, row in enumerate(logits)])
    return loss, right.float().mean().item()


def random_caption(portraits: Portraits, index: int, rng: np.random.Generator) -> tuple[str, list[int]]:
    """A caption of a portrait, half of them whole, and the index of each value it says (or of "unsaid")."""
    identity, attributes = portraits.identity(index), portraits.attributes_of(index)
    keep = 1.0 if rng.random() < 0.5 else float(rng.random())
    caption = captions.fine_caption(identity, attributes, rng, keep=keep)
    said = []
    for name, values in NAMES.items():
        value = getattr(identity if name in world.FACTORS else attributes, name)
        said.append(values.index(value) if captions.says(caption, name, value) else len(values))
    return caption, said


def train(
    portraits: Portraits,
    tokenizer: CLIPTokenizer,
    steps: int,
    out: Path,
    *,
    batch: int = 64,
    seed: int = 0,
    learning_rate: float = 4e-3,
    report=lambda step, figures: None,
) -> Towers:
    """Train all three encoders. Goes on from `out`, which is written now and then."""
    torch.manual_seed(seed)
    towers = Towers(tokenizer)
    optimiser = MuonAdamW(
        towers, learning_rate, adamw_names=("embedding", "read_out", "projection", "scales")
    )
    first = checkpoints.resume(out, towers, optimiser)["step"]
    for step in range(first, steps):
        rng = np.random.default_rng([seed, step])
        picks = rng.integers(len(portraits), size=batch)
        texts, said = zip(*(random_caption(portraits, int(i), rng) for i in picks), strict=True)
        losses, right = towers.losses(
            tokenise(tokenizer, list(texts)), torch.tensor(said), *_seen(portraits, torch.from_numpy(picks))
        )
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        set_learning_rate(optimiser, learning_rate * warm_up_and_cosine(step, steps, 50))
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            towers.scales.clamp_(max=4.6)  # a hundredfold at most, as CLIP's
        if checkpoints.due(step, steps):
            checkpoints.save(out, towers, optimiser, step)
            report(step + 1, {**{k: v.item() for k, v in losses.items()}, **right})
    return towers.eval()


def _seen(portraits: Portraits, picks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pixels, values shown, proportions) of portraits."""
    shown = torch.cat([portraits.factors[picks], portraits.attributes[picks]], 1)
    return to_pixels(portraits.pixels[picks]), shown, portraits.proportions[picks]
