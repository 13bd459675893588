"""The command line's conditions: a sentence, skeletons, pictures, or encoded ones from a file."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .conditions import Conditions, Given
from .conditions.image import CLIPImageEncoder
from .conditions.pose import pose_from_keypoints
from .conditions.text import TextEncoder, check_prompt
from .descriptions import KINDS, ConditionDescription
from .documents import read_json
from .inspection import CONDITION_KEY
from .numbers import check_finite
from .pictures import read_picture
from .safetensors_file import open_safetensors

_PICTURES = ("style", "identity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a LoRA can be predicted from."""
    wish = parser.add_argument_group("what the LoRA shall bring out (one or several)")
    wish.add_argument("--prompt", metavar="TEXT", help="a sentence (BASE has a text encoder)")
    wish.add_argument("--pose", type=Path, metavar="JSON", help="skeletons, as POSE_KEYPOINT is saved")
    for kind in _PICTURES:
        wish.add_argument(
            f"--{kind}", type=Path, nargs="+", metavar="PICTURE", help=f"pictures of the {kind}"
        )
    wish.add_argument(
        "--image-encoder",
        type=Path,
        metavar="FOLDER",
        help="CLIP's vision tower for the pictures (default: image_encoder/ of BASE)",
    )
    wish.add_argument(
        "--condition",
        type=Path,
        metavar="COND",
        help=f"encoded already: {CONDITION_KEY} [1, S, d], or tensors named pose, style, identity",
    )
    wish.add_argument(
        "--weight",
        type=_weight,
        action="append",
        default=[],
        metavar="KIND=X",
        help="how strongly one of several conditions counts, such as style=0.5 (default: 1)",
    )


def input_files(options: argparse.Namespace) -> list[Path]:
    """The files that the conditions are read from."""
    pictures = [path for kind in _PICTURES for path in getattr(options, kind) or ()]
    return [path for path in (options.pose, options.condition, *pictures) if path is not None]


def read_conditions(
    options: argparse.Namespace, known: Mapping[str, ConditionDescription], base: Path
) -> Conditions:
    """The conditions that the options name, encoded as the hypernetwork takes them. ValueError where there is
    none, one does not fit, or a file is not what it should be.
    """
    found = _encoded(options.condition) if options.condition is not None else {}
    sources = {kind: f"{options.condition}: {kind}" for kind in found}
    asked = [kind for kind in ("pose", *_PICTURES) if getattr(options, kind) is not None]
    asked += ["text"] if options.prompt is not None else []
    if not found and not asked:
        raise ValueError(
            "say what the LoRA shall bring out: --prompt, --pose, --style, --identity or --condition."
        )
    for kind in (*found, *asked):
        if kind not in known:
            raise ValueError(f"This hypernetwork is conditioned on {' and '.join(known)}, not on {kind}.")
    if twice := set(found) & set(asked):
        raise ValueError(f"{options.condition}: holds {min(twice)}, which is given by its own option too.")
    for kind in asked:
        found[kind] = _ENCODE[kind](options, known[kind], base)
    for kind, tensor in found.items():
        _check(sources.get(kind, f"the {kind} condition"), tensor, known[kind])
    return _weighted(found, dict(options.weight))


def _weighted(found: Mapping[str, Tensor], weights: Mapping[str, float]) -> Conditions:
    if unknown := set(weights) - set(found):
        raise ValueError(f"--weight {min(unknown)}: no such condition is given.")
    return {
        kind: Given(tensor, torch.tensor([weights[kind]]) if kind in weights else None)
        for kind, tensor in found.items()
    }


def _text(options: argparse.Namespace, known: ConditionDescription, base: Path) -> Tensor:
    check_prompt(options.prompt, known.words)
    states = TextEncoder.open(base).encode(options.prompt)
    return torch.nn.functional.pad(states, (0, 0, 0, max(0, known.padded_to - states.shape[1])))


def _pose(options: argparse.Namespace, known: ConditionDescription, base: Path) -> Tensor:
    document = read_json(options.pose)
    try:
        return pose_from_keypoints(document, *known.size)
    except ValueError as error:
        raise ValueError(f"{options.pose}: {error}") from error


def _pictures(kind: str, options: argparse.Namespace, base: Path) -> Tensor:
    encoder = CLIPImageEncoder.open(options.image_encoder or base)
    return encoder.encode([read_picture(path) for path in getattr(options, kind)])


_ENCODE = {
    "text": _text,
    "pose": _pose,
    "style": lambda options, known, base: _pictures("style", options, base),
    "identity": lambda options, known, base: _pictures("identity", options, base),
}


def _encoded(path: Path) -> dict[str, Tensor]:
    """Kind -> tensor of a condition file."""
    file = open_safetensors(path)
    names = {CONDITION_KEY: "text"} | {kind: kind for kind in KINDS if kind != "text"}
    if not file.keys() or set(file) - set(names):
        raise ValueError(
            f"{path}: holds {', '.join(file.keys()[:3]) or 'nothing'}; expected {CONDITION_KEY} [1, S, d], "
            "or tensors named pose, style, identity."
        )
    return {names[name]: file.tensor(name) for name in file}


def _check(source: str, tensor: Tensor, known: ConditionDescription) -> None:
    shape, pose = list(tensor.shape), known.kind == "pose"
    wanted = [1, known.width, *known.size] if pose else [1, "S", "d"]
    fits = shape == wanted if pose else len(shape) == 3 and shape[0] == 1 and shape[1] > 0
    if not fits or not tensor.is_floating_point():
        raise ValueError(
            f"{source} is {tensor.dtype} of shape {shape}; expected floating point numbers of shape "
            f"[{', '.join(map(str, wanted))}]."
        )
    if not pose and shape[2] != known.width:
        raise ValueError(
            f"{source}: {shape[2]} numbers per token; this hypernetwork takes {known.width}. "
            "Use the encoder that the hypernetwork was trained with."
        )
    check_finite(tensor, source)


def _weight(text: str) -> tuple[str, float]:
    kind, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in KINDS or not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a kind ({', '.join(KINDS)}), =, and a number of 0 or more"
        )
    return kind, value
