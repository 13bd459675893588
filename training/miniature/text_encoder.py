"""The miniature's text encoder: a UMT5 encoder of tiny size and a SentencePiece model, both trained on the
captions.

It learns to fill in masked tokens and to hold, in its states, what each factor's value is (or that it was
left unsaid). It is frozen afterwards; base model, LoRAs and hypernetwork see only its states.
"""

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
    actions: list[world.Action], rng: np.random.Generator
) -> tuple[str, world.Action, world.Look | None]:
    """A caption with random parts dropped, in training's sentence plans and in all wordings, and what it
    describes.
    """
    action = actions[int(rng.integers(len(actions)))]
    look = world.random_look(rng) if rng.random() < 0.7 else None
    keep = 1.0 if rng.random() < 0.5 else float(rng.random())
    return captions.fine_caption(action, look, rng, wordings="both", keep=keep), action, look


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
    mask = tokens != PAD
    return model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state * mask.unsqueeze(-1)


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
    report=lambda step, figures: None,
) -> UMT5EncoderModel:
    """Masked-token and factor read-out training; loss: cross-entropy of both."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = build(tokenizer.pieces.get_piece_size())
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
