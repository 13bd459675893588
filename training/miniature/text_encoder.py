"""The miniature's text encoder: a UMT5 encoder of tiny size and a SentencePiece model, both trained on the
captions.

It learns to fill in masked tokens and to hold, in its states, what each factor's value is (or that it was
left unsaid). It is frozen afterwards; base model, LoRAs and hypernetwork see only its states.
"""

import copy
import io
import os
from dataclasses import astuple
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import nn
from torch.nn import functional as F
from transformers import UMT5Config, UMT5EncoderModel

from . import captions, world

PAD, END, UNKNOWN = 0, 1, 2
WIDTH = 64
_READ_OUT = {
    **world.FACTORS,
    "shirt": tuple(world.COLOURS),
    "trousers": tuple(world.COLOURS),
    "backdrop": world.BACKDROPS,
}


def train_tokenizer(actions: list[world.Action], seed: int = 0, sentences: int = 20_000) -> bytes:
    """A serialised unigram SentencePiece model: pad 0, end 1, unknown 2; folds A-Z to a-z and
    tabs and line ends to spaces, changes nothing else."""
    rng = np.random.default_rng(seed)
    corpus = (random_caption(actions, rng)[0] for _ in range(sentences))
    model = io.BytesIO()
    # Relative, because the model file keeps the name. Lines are hexadecimal code points: from, to.
    rules = os.path.relpath(Path(__file__).with_name("lower_case.tsv"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus, model_writer=model, model_type="unigram", vocab_size=256,
        pad_id=PAD, eos_id=END, unk_id=UNKNOWN, bos_id=-1, pad_piece="<pad>", eos_piece="</s>",
        unk_piece="<unk>",
        normalization_rule_tsv=rules, required_chars="abcdefghijklmnopqrstuvwxyz", num_threads=1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def random_caption(
    actions: list[world.Action], rng: np.random.Generator, wordings: str = "both"
) -> tuple[str, world.Action, world.Look | None]:
    """A caption with random parts dropped, in training's sentence plans, and what it describes."""
    action = actions[int(rng.integers(len(actions)))]
    look = world.random_look(rng) if rng.random() < 0.7 else None
    keep = 1.0 if rng.random() < 0.5 else float(rng.random())
    return captions.fine_caption(action, look, rng, wordings=wordings, keep=keep), action, look


class Tokenizer:
    """SentencePiece ids with the end token, padded with zeros."""

    def __init__(self, model: bytes):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 [B, longest]."""
        rows = [torch.tensor(self.pieces.encode(text) + [END]) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def build(vocabulary: int) -> UMT5EncoderModel:
    """A randomly initialised miniature UMT5 encoder."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary, d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=PAD, eos_token_id=END,
            decoder_start_token_id=PAD,
        )
    )  # fmt: skip


@torch.no_grad()
def encode(model: UMT5EncoderModel, tokens: torch.Tensor) -> torch.Tensor:
    """States [B, S, WIDTH] with zero rows after each prompt's end, as WAN's pipeline makes them."""
    return _states(model, tokens)


class _ReadOut(nn.Module):
    """Per factor, one attention query over the states and a linear classifier with a last class "unsaid"."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(_READ_OUT), WIDTH) * 0.1)
        self.heads = nn.ModuleList([nn.Linear(WIDTH, len(values) + 1) for values in _READ_OUT.values()])

    def forward(self, states, mask):
        scores = torch.einsum("fd,bsd->bfs", self.query, states).masked_fill(~mask.unsqueeze(1), -1e4)
        pooled = scores.softmax(-1) @ states
        return [head(pooled[:, i]) for i, head in enumerate(self.heads)]


def train(
    actions: list[world.Action],
    tokenizer: Tokenizer,
    steps: int,
    *,
    batch: int = 64,
    seed: int = 0,
    learning_rate: float = 2e-3,
    start_from: UMT5EncoderModel | None = None,
    report=lambda step, figures: None,
) -> UMT5EncoderModel:
    """Masked-token and factor read-out training, from random weights or in place; loss: cross-entropy of
    both.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = start_from or build(tokenizer.pieces.get_piece_size())
    read_out = _ReadOut()
    fill_in = nn.Linear(WIDTH, model.config.vocab_size)
    parameters = [*model.parameters(), *read_out.parameters(), *fill_in.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        sample = [random_caption(actions, rng) for _ in range(batch)]
        tokens = tokenizer([text for text, _, _ in sample])
        mask = tokens != PAD
        hidden = mask & (torch.rand(tokens.shape) < 0.15) if step % 2 else torch.zeros_like(mask)
        states = model(
            input_ids=tokens.masked_fill(hidden, UNKNOWN), attention_mask=mask.long()
        ).last_hidden_state
        if step % 2:
            loss = F.cross_entropy(fill_in(states[hidden]), tokens[hidden])
        else:
            logits = read_out(states, mask)
            wanted = _labels(sample)
            loss = sum(F.cross_entropy(row, wanted[:, i]) for i, row in enumerate(logits)) / len(logits)
            right = (
                torch.stack([row.argmax(-1) == wanted[:, i] for i, row in enumerate(logits)]).float().mean()
            )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 200 == 0 and step:
            report(step, {"loss": loss.item(), "read_out": right.item()})
    return model.eval()


def align_paraphrases(
    model: UMT5EncoderModel,
    actions: list[world.Action],
    tokenizer: Tokenizer,
    steps: int,
    *,
    batch: int = 32,
    seed: int = 0,
    learning_rate: float = 1e-3,
    report=lambda step, figures: None,
) -> UMT5EncoderModel:
    """Teach the encoder, in place and from text alone, that the reserved words mean what training's words do.

    Captions in training's wordings keep the states they had (whoever reads these states has learned them);
    captions in reserved wordings, in training's sentence plans, move to those of a caption that says the same
    in training's first wordings.
    """
    rng = np.random.default_rng([seed, 1])
    before = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        kept = tokenizer([random_caption(actions, rng, "train")[0] for _ in range(batch)])
        pairs = [_paraphrases(actions, rng) for _ in range(batch)]
        plain, other = (tokenizer([pair[i] for pair in pairs]) for i in (0, 1))
        change = (_states(model, kept) - encode(before, kept)).pow(2).sum(-1).sum() / (kept != PAD).sum()
        distance = set_distance(_states(model, other), other != PAD, encode(before, plain), plain != PAD)
        optimiser.zero_grad()
        (change + distance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            report(step, {"change": change.item() / WIDTH, "distance": distance.item() / WIDTH})
    return model.eval()


def set_distance(
    a: torch.Tensor, a_mask: torch.Tensor, b: torch.Tensor, b_mask: torch.Tensor
) -> torch.Tensor:
    """Mean squared distance of every state to the nearest of the other caption's, both ways (Chamfer).

    a [B, S, d], b [B, T, d] with masks [B, S], [B, T], True where a token stands.
    """
    distances = (a.unsqueeze(2) - b.unsqueeze(1)).pow(2).sum(-1)
    far = torch.finfo(distances.dtype).max
    to_b = distances.masked_fill(~b_mask.unsqueeze(1), far).amin(2)
    to_a = distances.masked_fill(~a_mask.unsqueeze(2), far).amin(1)
    return (to_b * a_mask).sum() / a_mask.sum() + (to_a * b_mask).sum() / b_mask.sum()


def _states(model: UMT5EncoderModel, tokens: torch.Tensor) -> torch.Tensor:
    mask = tokens != PAD
    return model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state * mask.unsqueeze(-1)


def _paraphrases(actions: list[world.Action], rng: np.random.Generator) -> tuple[str, str]:
    """One action said in training's first wordings, and in reserved or any ones."""
    action = actions[int(rng.integers(len(actions)))]
    other = "reserved" if rng.random() < 0.7 else "both"
    return (
        captions.fine_caption(action, None, rng, wordings="first"),
        captions.fine_caption(action, None, rng, wordings=other),
    )


def _labels(sample) -> torch.Tensor:
    """int64 [B, len(_READ_OUT)]: the value each caption says, or the class "unsaid" (told from the words
    themselves).
    """
    rows = []
    for text, action, look in sample:
        values = dict(zip(world.FACTORS, astuple(action), strict=True))
        if look is not None:
            values |= {"shirt": look.shirt, "trousers": look.trousers, "backdrop": look.backdrop}
        rows.append(
            [
                options.index(values[name])
                if name in values and captions.says(text, name, values[name])
                else len(options)
                for name, options in _READ_OUT.items()
            ]
        )
    return torch.tensor(rows)
