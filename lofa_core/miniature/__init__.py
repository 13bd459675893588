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
HYPERNETWORK = FOLDER / "lofa_miniature_text.safetensors"
FIGURES = FOLDER / "figures.json"

COARSE_PROMPT = "a person is moving"
FRAMES, SIZE = 17, 64
