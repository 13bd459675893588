"""Text conditions: the base model's own text encoder, and a check of a sentence's words before it is used.

The encoder is WAN2.1's UMT5 or a smaller one of the same architecture, read from a base folder in the
diffusers/transformers layout. transformers and sentencepiece are needed for it alone and imported when it is
opened.
"""

import difflib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .pretrained import errors_of, open_pretrained

MAX_TOKENS = 512  # what WAN2.1 was trained to read
_SHOWN_UNKNOWN = 8


def base_folder(base: Path | str) -> Path:
    """The folder that holds text_encoder/ and tokenizer/: `base` itself, or one that its weights lie in.

    Raises ValueError where there is none (a lone file of diffusion weights, as ComfyUI uses them).
    """
    base = Path(base)
    for folder in (base, base.parent, base.parent.parent):
        if (folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir():
            return folder
    raise ValueError(
        f"{base}: no text_encoder/ and tokenizer/ folders beside these weights to encode a prompt with. "
        "Name a base folder in the diffusers layout, or give the encoded text as a condition file."
    )


def check_prompt(prompt: str, words: Collection[str]) -> None:
    """Check that a closed vocabulary `words` covers what `prompt` says; empty `words`: any text goes.

    Raises ValueError for an empty prompt, and for unknown words with the nearest known ones.
    """
    used = _words(prompt)
    if not prompt.strip() or (words and not used):
        raise ValueError("The prompt is empty. Describe the action, for example who moves what, and how.")
    if not words:
        return
    known = {word.lower() for word in words}
    unknown = [word for word in dict.fromkeys(used) if word not in known]
    if not unknown:
        return
    described = []
    for word in unknown[:_SHOWN_UNKNOWN]:
        near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
        described.append(f'"{word}"' + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    if len(unknown) > _SHOWN_UNKNOWN:
        described.append(f"and {len(unknown) - _SHOWN_UNKNOWN} more")
    content = ", ".join(sorted(word for word in known if len(word) > 2))
    plural = "s" if len(unknown) > 1 else ""
    raise ValueError(
        f"This model does not know the word{plural} {', '.join(described)}. The words it knows: {content}."
    )


def _words(text: str) -> list[str]:
    """Lower-case words: whatever is not a letter parts them, and a possessive 's is dropped."""
    return re.findall(r"[^\W\d_]+", re.sub(r"['’]s\b", "", text.lower()))


class TextEncoder:
    """A UMT5 encoder with its tokenizer."""

    def __init__(self, model: Any, tokenize: Callable[[str], list[int]]):
        self._model = model
        self._tokenize = tokenize

    @classmethod
    def open(cls, folder: Path | str, device: torch.device | str = "cpu") -> "TextEncoder":
        """Read text_encoder/ and tokenizer/ of a base folder, the weights in their own dtype, onto a device.

        Raises ValueError for files that are not a complete UMT5 encoder, or where transformers is missing.
        """
        folder = base_folder(folder)
        model = open_pretrained("UMT5EncoderModel", folder / "text_encoder", "UMT5 encoder", dtype="auto")
        return cls(model.to(device), _open_tokenizer(folder / "tokenizer"))

    def encode(self, prompt: str) -> Tensor:
        """States [1, S, d] of the prompt's tokens and the closing </s>, without padding rows.

        Raises ValueError for an empty prompt and for one that is longer than WAN2.1 reads.
        """
        text = " ".join(prompt.split())
        check_prompt(text, ())
        ids = self._tokenize(text)
        if len(ids) > MAX_TOKENS:
            raise ValueError(f"The prompt has {len(ids)} tokens; WAN2.1 reads {MAX_TOKENS}. Shorten it.")
        known = self._model.config.vocab_size
        if max(ids) >= known:
            raise ValueError(
                f"The tokenizer gives token {max(ids)}, the text encoder knows {known}. "
                "The tokenizer and text_encoder folders belong to different models."
            )
        tokens = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode():
            return self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state


def _open_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """Text -> ids that end with </s>. diffusers reads tokenizer.json, ComfyUI reads spiece.model."""
    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        with errors_of(folder, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return lambda text: tokenizer(text).input_ids
    if not (folder / "spiece.model").is_file():
        raise ValueError(f"{folder}: neither tokenizer.json nor spiece.model is here. Copy the folder again.")
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(f"{folder}: reading spiece.model needs: pip install sentencepiece") from error
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    except RuntimeError as error:
        raise ValueError(f"{folder / 'spiece.model'}: not a SentencePiece model, or damaged.") from error
    return lambda text: [*pieces.encode(text), pieces.eos_id()]
