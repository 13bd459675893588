"""The embedded default: WAN2.1 at a thousandth of its size, with its hypernetwork. Weights and their places
only.

Made by `python -m training.miniature.make` and `python training/train.py`; figures.json says how and how
good.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DIFFUSION_MODEL = FOLDER / "transformer" / "wan_miniature.safetensors"
VAE = FOLDER / "vae" / "wan_miniature_vae.safetensors"
TEXT_ENCODER = FOLDER / "text_encoder" / "model.safetensors"
TEXT_ENCODER_CONFIG = FOLDER / "text_encoder" / "config.json"
TOKENIZER = FOLDER / "tokenizer" / "spiece.model"
IMAGE_ENCODER = FOLDER / "image_encoder" / "model.safetensors"
HYPERNETWORK = FOLDER / "lofa_miniature.safetensors"
FIGURES = FOLDER / "figures.json"
EXAMPLES = FOLDER / "examples"

COARSE_PROMPT = "a person is moving"
FRAMES, SIZE = 17, 64

_SUFFIX = {"pose": ".json", "style": ".png"}


def example_names(kind: str) -> list[str]:
    """What there are examples of: "pose" (POSE_KEYPOINT) or "style" (a picture)."""
    return sorted(path.stem for path in (EXAMPLES / kind).glob(f"*{_SUFFIX[kind]}"))


def example(kind: str, name: str) -> Path:
    """The file of one of `example_names`. ValueError for another name."""
    if name not in example_names(kind):
        raise ValueError(f"{name!r}: no such {kind} example; there are {', '.join(example_names(kind))}.")
    return EXAMPLES / kind / f"{name}{_SUFFIX[kind]}"
