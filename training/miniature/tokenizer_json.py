"""A SentencePiece model as tokenizer.json, which transformers 5 reads without protobuf."""

import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .text_encoder import END, UNKNOWN

# extra_ids 0: without it T5's tokenizer appends a hundred tokens the encoder has no rows for.
_CONFIG = {
    "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
    "extra_ids": 0, "additional_special_tokens": [], "model_max_length": 512,
}  # fmt: skip


def write(model: bytes, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; ids equal SentencePiece's own plus the end token."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    scored = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=UNKNOWN, byte_fallback=False))
    # T5's tokenizer keeps this normaliser and no other, so the case folding has to travel in it.
    tokenizer.normalizer = normalizers.Precompiled(_field(_field(model, 3), 2))
    metaspace = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=1) + "\n")


def _field(message: bytes, number: int) -> bytes:
    """The first length-delimited field `number` of a protobuf message (SentencePiece's ModelProto and its
    parts).
    """
    return next(value for found, value in _fields(message) if found == number and isinstance(value, bytes))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(wire) or _varint(message, at)
            yield key >> 3, message[at : at + size]
            at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
