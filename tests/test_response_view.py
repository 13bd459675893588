import numpy as np
import pytest
import torch

from lofa_core.response_view import atlas, views
from lofa_core.steps import Watch

Q, K = "blocks.0.self_attn.q", "blocks.0.self_attn.k"
LATER = "blocks.1.self_attn.q"


def test_layers_come_by_depth_with_their_share_and_maps_of_the_sizes_asked_for():
    half = torch.zeros(8, 4)
    half[:4] = 1.0
    first, second, third = views({LATER: half, Q: torch.ones(8, 4), K: half}, small=2, large=4)
    assert [first.name, second.name, third.name] == [Q, K, LATER]
    assert (first.depth, first.kind, first.shape, first.share) == (0, "self_attn.q", (8, 4), 1.0)
    assert second.share == 0.5 and second.cosine is None and second.second is None
    assert second.small.tolist() == [[1, 1], [0, 0]] and second.large.shape == (4, 4)


def test_a_second_response_is_compared_where_it_has_the_layer():
    first, second = views({Q: torch.eye(4), K: torch.eye(4)}, {Q: torch.ones(4, 4)}, small=2, large=2)
    assert first.cosine == pytest.approx(0.5) and first.second.share == 1.0
    assert second.cosine is None and second.second is None


def test_responses_of_two_base_models_are_refused():
    with pytest.raises(ValueError, match=f"{Q} is 4x4 in the first response and 8x8 in the second"):
        views({Q: torch.eye(4)}, {Q: torch.eye(8)}, small=2, large=2)


def test_every_map_is_asked_for_once_and_reported():
    asked, reported = [], []

    class Maps(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    maps = Maps({Q: torch.eye(4), K: torch.eye(4)})
    views(maps, small=2, large=2, watch=Watch(lambda *done: reported.append(done), lambda: None))
    assert asked == [Q, K] and reported == [(1, 2), (2, 2)]


def test_cancelling_asks_for_no_further_map():
    reported = []

    def check():
        if reported:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch = Watch(lambda *done: reported.append(done), check)
        views({Q: torch.eye(4), K: torch.eye(4)}, small=2, large=2, watch=watch)
    assert reported == [(1, 2)]


def test_an_atlas_has_its_tiles_in_rows():
    picture = atlas([np.zeros((2, 2)), np.ones((2, 2)), np.ones((2, 2))], columns=2)
    assert picture.shape == (4, 4, 3)
    low, high = picture[0, 0].tolist(), picture[0, 2].tolist()
    assert low != high and picture[3, 1].tolist() == high
    assert not picture[2:, 2:].any()  # no fourth map
