import numpy as np
import pytest
import torch

from lofa_core.base_models import WAN_KINDS
from lofa_core.heatmap import overview, render

LOW, HIGH, GREY = (68, 1, 84), (253, 231, 37), (214, 214, 218)


def wan(value, depths=(0, 1), kinds=WAN_KINDS, shape=(96, 96)):
    return {f"blocks.{depth}.{kind}": torch.full(shape, value) for depth in depths for kind in kinds}


def count(picture, colour):
    return int((picture == np.array(colour, np.uint8)).all(-1).sum())


def where(picture, colour, cell=96):
    """Rows and columns of the grid's pixels of a colour; the colour bar at the right is left out."""
    bar = 45 * max(1, cell // 48)
    return np.nonzero((picture[:, :-bar] == np.array(colour, np.uint8)).all(-1))


def test_every_layer_is_a_square_in_the_ramps_colour():
    picture = render(wan(1.0))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert count(picture, HIGH) >= 2 * 8 * 96 * 96
    assert count(render(wan(0.0)), LOW) >= 2 * 8 * 96 * 96


def test_the_grid_is_rows_of_depths_and_columns_of_kinds():
    maps = wan(0.0, depths=(0, 1), kinds=("self_attn.q", "cross_attn.o"), shape=(8, 8))
    maps["blocks.1.cross_attn.o"] = torch.ones(8, 8)
    picture = render(maps)
    low, high = where(picture, LOW), where(picture, HIGH)
    for axis in (0, 1):  # the one bright square is the lowest and the rightmost
        assert high[axis].max() - high[axis].min() == 95 and high[axis].max() == low[axis].max()
        assert high[axis].min() - low[axis].min() > 95


def test_a_gradient_inside_a_layer_keeps_its_direction():
    maps = {
        "blocks.0.self_attn.q": torch.linspace(-0.1, 1, 1536).clamp(0).expand(1536, 1536)
    }  # along the inputs
    picture = render(maps, cell=64)
    rows, columns = where(picture, LOW, cell=64)
    assert rows.max() - rows.min() == 63
    green = picture[rows.min() : rows.min() + 64, columns.min() : columns.min() + 64, 1].astype(int)
    assert (np.diff(green, axis=1) >= 0).all() and (np.diff(green, axis=0) == 0).all()
    assert green[0, -1] > 220


def test_maps_are_averaged_down_and_repeated_up():
    stripes = torch.zeros(1280, 640)
    stripes[::2] = 1.0
    large = render({"blocks.0.self_attn.q": stripes}, cell=32)
    assert count(large, (33, 144, 141)) >= 32 * 32  # the ramp's middle
    assert count(render({"blocks.0.self_attn.q": torch.ones(2, 3)}, cell=32), HIGH) >= 32 * 32


def test_missing_layers_are_grey_and_repeats_are_dropped():
    maps = wan(0.5)
    del maps["blocks.1.self_attn.v"]
    assert count(render(maps), GREY) == 96 * 96
    every = [kind for _ in range(2) for kind in WAN_KINDS]
    assert (render(maps) == render(maps, columns=every, rows=[0, 0, 1, 1])).all()


def test_only_the_rows_and_columns_asked_for_are_drawn():
    tall, wide = render(wan(0.5), rows=[1]), render(wan(0.5), columns=["self_attn.q"])
    assert tall.shape[0] < render(wan(0.5)).shape[0] and wide.shape[1] < tall.shape[1]


def test_sdxl_names_are_placed_by_the_order_of_its_blocks():
    first = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    middle = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    picture = render({middle: torch.ones(32, 32), first: torch.zeros(32, 32)}, cell=32)
    assert where(picture, LOW, 32)[0].max() < where(picture, HIGH, 32)[0].min()


def test_bad_maps_are_refused():
    with pytest.raises(ValueError, match="no response map"):
        render({})
    with pytest.raises(ValueError, match="expected \\[out, in\\]"):
        render({"blocks.0.self_attn.q": torch.ones(4)})
    with pytest.raises(ValueError, match="not numbers"):
        render({"blocks.0.self_attn.q": torch.full((4, 4), float("nan"))})
    with pytest.raises(ValueError, match="text_model"):
        render({"text_model.layers.0": torch.ones(4, 4)})
    with pytest.raises(ValueError, match="at least 16"):
        render(wan(0.5), cell=8)


@pytest.mark.parametrize("depths", [4, 30, 40])
def test_the_overview_fits_a_node_however_many_depths_there_are(depths):
    picture = overview(wan(1.0, depths=range(depths), shape=(8, 8)))
    assert picture.shape[0] < 800 and picture.shape[1] < 800
    assert count(picture, HIGH) > 0.9 * 8 * 40 * min(40, 448 // depths) * depths * 0.8


def test_low_rows_are_labelled_now_and_then():
    every = render(wan(0.5, depths=range(12)), cell=32, height=6, scale=1)
    first = render(wan(0.5, depths=range(1)), cell=32, height=6, scale=1)
    ink = (every[:, :40] == 40).all(-1) | (every[:, :40] == (40, 40, 46)).all(-1)
    assert first.shape[1] <= every.shape[1] and 0 < ink.any(1).sum() < 12 * 7


def test_sdxls_columns_have_short_labels():
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    narrow = render({f"{block}.attn1.to_out.0": torch.ones(8, 8)}, cell=48)
    assert narrow.shape[1] == render({f"{block}.attn1.to_q": torch.ones(8, 8)}, cell=48).shape[1]
