"""Response heatmaps: one small map per target layer on a labelled grid, a row per depth, a column per kind.

numpy and torch only, so that nodes, command line and demo draw the same picture: the letters are a 5x7 dot
font, the colours a ramp of even lightness steps.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .key_names import SDXL_PLACES
from .steps import UNWATCHED, Watch

# Anchors of viridis (public domain): perceptually even, readable when colour-blind.
_RAMP = np.array(
    [
        (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
        (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
    ],
    dtype=np.float64,
)  # fmt: skip
_SDXL_BLOCKS = (f"{place}.transformer_blocks.{n}" for place, _, blocks in SDXL_PLACES for n in range(blocks))
_SDXL_DEPTH = {block: depth for depth, block in enumerate(_SDXL_BLOCKS)}
_PAPER, _INK, _ABSENT = (255, 255, 255), (40, 40, 46), (214, 214, 218)

# 5x7 dots, a row per hexadecimal pair, its lowest five bits from left to right. Tails hang two dots lower.
_FONT = {
    "a": "00000e010f110f", "b": "1010161911111e", "c": "00000e1010110e", "d": "01010d1311110f",
    "e": "00000e111f100e", "f": "0609081c080808", "g": "0f1111110f010e", "h": "10101619111111",
    "i": "04000c0404040e", "j": "0200060202120c", "k": "10101214181412", "l": "0c04040404040e",
    "m": "00001a15151111", "n": "00001619111111", "o": "00000e1111110e", "p": "1e1111111e1010",
    "q": "0f1111110f0101", "r": "00001619101010", "s": "00000e100e011e", "t": "08081c08080906",
    "u": "0000111111130d", "v": "00001111110a04", "w": "0000111115150a", "x": "0000110a040a11",
    "y": "111111110f010e", "z": "00001f0204081f", "0": "0e11131519110e", "1": "040c040404040e",
    "2": "0e11010204081f", "3": "1f02040201110e", "4": "02060a121f0202", "5": "1f101e0101110e",
    "6": "0608101e11110e", "7": "1f010204080808", "8": "0e11110e11110e", "9": "0e11110f01020c",
    ".": "00000000000c0c", "_": "0000000000001f", "-": "0000001f000000", ",": "0000000c0c0408",
    ":": "000c0c000c0c00", "%": "18190204081303", " ": "00000000000000",
}  # fmt: skip
_TAILED, _TAIL = "gpqy,", 2
_GLYPH_WIDTH, _GLYPH_HEIGHT, _ADVANCE = 5, 7, 6
_LABEL_STEPS = (1, 2, 5, 10, 20)  # every how many-th row is labelled where the rows are low
_OVERVIEW_WIDTH, _OVERVIEW_HEIGHT = 384, 448  # pixels of its maps alone
_CAPTIONS = (
    "colour: how likely the lora changes a weight",
    "each square is one weight matrix: rows are outputs, columns are inputs",
)


def render(
    responses: Mapping[str, Tensor],
    *,
    columns: Iterable[str] | None = None,
    rows: Iterable[int] | None = None,
    cell: int = 96,
    height: int | None = None,
    scale: int | None = None,
    watch: Watch = UNWATCHED,
) -> np.ndarray:
    """Draw `responses` (canonical layer name -> [out, in], values 0..1) as uint8 [H, W, 3].

    `columns` are the kinds and `rows` the depths to show, in this order (repeats are dropped); by default all
    that occur. Each map is averaged, or enlarged, to `cell` x `height` (by default `cell`) pixels; a layer
    without a map is grey. A letter is 5 x 7 dots of `scale` pixels. Raises ValueError for no map at
    all, a map that is not two-dimensional or not finite, a name that is no target layer's, or a cell below 16
    pixels.
    """
    if cell < 16:
        raise ValueError(f"cell is {cell} pixels; a layer's map needs at least 16 to be seen.")
    placed = {place(name): responses[name] for name in responses}
    if not placed:
        raise ValueError(
            "There is no response map to draw. A hypernetwork's Stage I gives them, LoRA Diffusion has none: "
            "save its LoRA and use Response from LoRA."
        )
    kinds = list(dict.fromkeys(columns if columns is not None else (kind for _, kind in placed)))
    depths = list(dict.fromkeys(rows if rows is not None else sorted({depth for depth, _ in placed})))

    scale = scale or min(4, max(1, cell // 48))
    height = height or cell
    gap, pad = min(2 * scale, max(1, height // 6)), 6 * scale
    heads = [(group, len(list(run))) for group, run in groupby(kinds, key=lambda kind: _split(kind)[0])]
    needed = [_text_width(_split(kind)[1], scale) + gap for kind in kinds]
    needed += [-(-(_text_width(group, scale) + pad) // count) for group, count in heads]
    pitch_x, pitch_y = max(cell, *needed) + gap, height + gap
    label_width = max(_text_width(f"block {depth}", scale) for depth in depths)
    line = (_GLYPH_HEIGHT + _TAIL + 2) * scale
    left, top = label_width + 2 * pad, 2 * line + 2 * pad
    bar = left + pitch_x * len(kinds) + pad
    width = bar + 10 * scale + pad + _text_width("100%", scale) + pad
    caption = [words for text in _CAPTIONS for words in _wrap(text, width - left - pad, scale)]
    bottom = top + max(pitch_y * len(depths), line)
    canvas = np.empty((bottom + pad + line * len(caption) + pad, width, 3), np.uint8)
    canvas[:] = _PAPER

    x = left
    for group, count in heads:
        span = pitch_x * count - gap
        _write(canvas, group, x + (span - _text_width(group, scale)) // 2, pad, scale)
        underline = pad + line - scale
        canvas[underline : underline + scale, x + pad // 2 : x + span - pad // 2] = _INK
        x += pitch_x * count
    inset = (pitch_x - gap - cell) // 2
    for column, kind in enumerate(kinds):
        x = left + column * pitch_x
        text = _split(kind)[1]
        _write(
            canvas, text, x + (pitch_x - gap - _text_width(text, scale)) // 2, pad + line + pad // 2, scale
        )
        for row, depth in enumerate(depths):
            watch.before()
            y = top + row * pitch_y
            response = placed.get((depth, kind))
            square = _ABSENT if response is None else colours(shrink(response, (height, cell)))
            canvas[y : y + height, x + inset : x + inset + cell] = square
            watch.after(column * len(depths) + row + 1, len(kinds) * len(depths))
    every = next(step for step in _LABEL_STEPS if step * pitch_y >= line or step == _LABEL_STEPS[-1])
    for row, depth in list(enumerate(depths))[::every]:
        text = f"block {depth}"
        y = top + row * pitch_y + (height - _GLYPH_HEIGHT * scale) // 2
        _write(canvas, text, left - pad - _text_width(text, scale), y, scale)
    _colour_bar(canvas, bar, top, min(3 * cell, pitch_y * len(depths) - gap), scale)
    for number, words in enumerate(caption):
        _write(canvas, words, left, bottom + pad + line * number, scale)
    return canvas


def overview(responses: Mapping[str, Tensor], watch: Watch = UNWATCHED) -> np.ndarray:
    """`render` small enough to be read on a node: low maps where there are many depths, large letters."""
    places = [place(name) for name in responses]
    depths, kinds = (len(set(part)) for part in zip(*places, strict=True))
    cell = max(16, _OVERVIEW_WIDTH // kinds)
    height = min(cell, max(5, _OVERVIEW_HEIGHT // depths))
    return render(responses, cell=cell, height=height, scale=2, watch=watch)


def place(name: str) -> tuple[int, str]:
    """(depth, kind) of a canonical name: WAN's name carries the depth, SDXL's blocks are counted.

    Raises ValueError for a name that is no target layer's.
    """
    wan = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    sdxl = re.fullmatch(r"(.+\.transformer_blocks\.\d+)\.(.+)", name)
    if wan:
        return int(wan[1]), wan[2]
    if sdxl and sdxl[1] in _SDXL_DEPTH:
        return _SDXL_DEPTH[sdxl[1]], sdxl[2]
    raise ValueError(
        f'"{name}" is not a target layer\'s name; expected one like "blocks.0.self_attn.q" (WAN) or '
        '"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" (SDXL).'
    )


def _split(kind: str) -> tuple[str, str]:
    """("self_attn", "q") of "self_attn.q": the heading of a run of columns and the column's own label.

    SDXL's "attn1.to_out.0" is ("attn1", "out"): the columns are narrow.
    """
    group, _, label = kind.partition(".")
    return group, label.removeprefix("to_").removesuffix(".0")


def shrink(response: Tensor, size: tuple[int, int]) -> np.ndarray:
    """[out, in] averaged (or repeated) to float [*size], whatever its own sides are."""
    if response.ndim != 2:
        raise ValueError(f"A response map has shape {tuple(response.shape)}; expected [out, in].")
    small = adaptive_avg_pool2d(response.detach().to("cpu", torch.float32)[None], size)[0]
    if not bool(torch.isfinite(small).all()):
        raise ValueError("A response map holds values that are not numbers; predict it again in float32.")
    return small.numpy()


def colours(values: np.ndarray) -> np.ndarray:
    """Values 0..1 (others are clipped) -> uint8 [..., 3], linear between the ramp's anchors."""
    position = np.clip(values, 0.0, 1.0) * (len(_RAMP) - 1)
    below = np.minimum(position.astype(int), len(_RAMP) - 2)
    share = (position - below)[..., None]
    return np.rint(_RAMP[below] * (1.0 - share) + _RAMP[below + 1] * share).astype(np.uint8)


def _colour_bar(canvas: np.ndarray, x: int, y: int, height: int, scale: int) -> None:
    """The ramp from 1 (top) to 0, with its values written beside it."""
    canvas[y : y + height, x : x + 10 * scale] = colours(np.linspace(1.0, 0.0, height))[:, None]
    half = _GLYPH_HEIGHT * scale // 2
    marks = {0: "100%", height - 1: "0%"}
    if height >= 60 * scale:  # room for three labels
        marks[height // 2] = "50%"
    for offset, text in marks.items():
        at = min(max(y + offset - half, y), y + height - _GLYPH_HEIGHT * scale)
        _write(canvas, text, x + 13 * scale, at, scale)


def _text_width(text: str, scale: int) -> int:
    return max(0, len(text) * _ADVANCE - (_ADVANCE - _GLYPH_WIDTH)) * scale


def _wrap(text: str, width: int, scale: int) -> list[str]:
    """Lines of whole words that fit `width` pixels (a single longer word keeps its line)."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _text_width(longer, scale) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(canvas: np.ndarray, text: str, x: int, y: int, scale: int) -> None:
    """Write lower-case `text` with its top left corner at (x, y); letters beyond the canvas are cut off."""
    for position, letter in enumerate(text):
        packed = np.frombuffer(bytes.fromhex(_FONT.get(letter, _FONT["-"])), np.uint8)
        dots = np.unpackbits(packed[:, None], axis=1)[:, -_GLYPH_WIDTH:].astype(bool)
        dots = np.kron(dots, np.ones((scale, scale), bool))
        start = x + position * _ADVANCE * scale
        upper = y + (_TAIL * scale if letter in _TAILED else 0)
        target = canvas[upper : upper + dots.shape[0], start : start + dots.shape[1]]
        target[dots[: target.shape[0], : target.shape[1]]] = _INK
