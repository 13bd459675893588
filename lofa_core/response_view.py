"""Response maps to look at: each layer's figures and its map, small enough to draw, from one pass."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .heatmap import colours, place, shrink
from .response_map import cosine
from .steps import UNWATCHED, Watch


@dataclass(frozen=True)
class LayerView:
    """One layer's response map [out, in], and where a second one is given, how far they agree.

    share: the mean of the map, the share of weights that change. small, large: float [side, side], averaged
    or enlarged. cosine: with the second map; None, as `second`, where there is none.
    """

    name: str
    depth: int
    kind: str
    shape: tuple[int, int]
    share: float
    small: np.ndarray
    large: np.ndarray
    second: "LayerView | None" = None
    cosine: float | None = None


def views(
    responses: Mapping[str, Tensor],
    second: Mapping[str, Tensor] | None = None,
    *,
    small: int,
    large: int,
    watch: Watch = UNWATCHED,
) -> list[LayerView]:
    """Every layer of `responses`, by depth; each map, which may be costly to make, is asked for once.

    Raises ValueError where a layer's two maps differ in shape: they belong to different base models.
    """
    places = {name: place(name) for name in responses}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    names = sorted(places, key=lambda name: (places[name][0], kinds.index(places[name][1])))
    return [
        _view(name, responses[name], None if second is None else second.get(name), small, large)
        for name in watch.each(names, len(names))
    ]


def _view(name: str, response: Tensor, second: Tensor | None, small: int, large: int) -> LayerView:
    if second is not None and second.shape != response.shape:
        raise ValueError(
            f"{name} is {_size(response)} in the first response and {_size(second)} in the second. Compare "
            "responses of one base model."
        )
    depth, kind = place(name)
    other = None if second is None else _view(name, second, None, small, large)
    return LayerView(
        name,
        depth,
        kind,
        (response.shape[0], response.shape[1]),
        response.mean().item(),
        shrink(response, (small, small)),
        shrink(response, (large, large)),
        other,
        None if second is None else cosine(response, second),
    )


def atlas(maps: list[np.ndarray], columns: int, watch: Watch = UNWATCHED) -> np.ndarray:
    """Square maps of one size as tiles of one picture, uint8 [H, W, 3], row by row, `columns` in a row."""
    side = len(maps[0])
    picture = np.zeros((-(-len(maps) // columns) * side, columns * side, 3), np.uint8)
    for number, values in enumerate(maps):
        watch.before()
        y, x = number // columns * side, number % columns * side
        picture[y : y + side, x : x + side] = colours(values)
    return picture


def _size(response: Tensor) -> str:
    return "x".join(map(str, response.shape))
