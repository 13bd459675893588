"""Dynamic Degree, Motion Smoothness and the flows below them, on videos whose motion is known."""

import numpy as np
import pytest
import torch
from small_videos import square, write_video
from torch.nn import functional as F

from lofa_core.metrics import motion, raft
from lofa_core.metrics.clips import read_folder
from lofa_core.metrics.motion import DISFlow, largest, moves, smoothness

CPU = torch.device("cpu")


def clip_of(tmp_path, frames, fps=8.0):
    write_video(tmp_path / "video.avi", frames, fps)
    return read_folder(tmp_path)[0][0]


class Steps:
    """A flow of the given length on 6 % of the picture, pair after pair."""

    def __init__(self, lengths):
        self._left, self.asked = list(lengths), 0

    def __call__(self, first, second):
        flow = np.zeros((*first.shape[:2], 2), np.float32)
        flow.reshape(-1, 2)[: round(0.06 * flow.size / 2)] = (0.0, self._left[self.asked])
        self.asked += 1
        return flow


def test_the_largest_flow_is_the_mean_of_the_longest_twentieth():
    flow = np.zeros((10, 20, 2))
    flow[0, :10, 0] = np.arange(1, 11)
    flow[0, :10, 1] = -np.arange(1, 11)
    assert largest(flow) == pytest.approx(np.sqrt(2) * 5.5)
    flow[0, 10:] = (3.0, 4.0)  # the longest ten of twenty that move
    lengths = sorted([*(np.sqrt(2) * np.arange(1, 11)), *[5.0] * 10])
    assert largest(flow) == pytest.approx(np.mean(lengths[-10:]))
    assert largest(np.full((2, 2, 2), 1.0)) == pytest.approx(np.sqrt(2))


@pytest.mark.parametrize(
    "lengths, wanted",
    [  # 16 frames: 4 pairs must pass 3 pixels, for a shorter side of 128
        ([3.1] * 4 + [0.0] * 11, 1.0),
        ([3.1] * 3 + [0.0] * 12, 0.0),
        ([0.0, 9.0] * 7 + [0.0], 1.0),
        ([2.9] * 15, 0.0),
        ([3.0] * 15, 0.0),
    ],
)
def test_a_video_moves_where_a_quarter_of_its_frames_do(tmp_path, lengths, wanted):
    clip = clip_of(tmp_path, np.zeros((16, 128, 160, 3), np.uint8))
    assert moves(clip, Steps(lengths)) == wanted


def test_frames_are_taken_about_eight_a_second(tmp_path):
    clip = clip_of(tmp_path, np.zeros((33, 64, 64, 3), np.uint8), fps=30.0)
    flow = Steps([0.0] * 32)
    assert moves(clip, flow) == 0.0
    assert flow.asked == 8  # every fourth of 33 frames: nine, eight pairs
    flow = Steps([9.0] * 32)
    assert moves(clip, flow) == 1.0 and flow.asked == 2  # of nine frames, round(2.25) pairs


def test_two_frames_need_a_pair_that_moves_and_one_cannot(tmp_path):
    clip = clip_of(tmp_path, np.zeros((2, 64, 64, 3), np.uint8))
    assert moves(clip, Steps([0.0])) == 0.0 and moves(clip, Steps([9.0])) == 1.0
    with pytest.raises(ValueError, match="nothing can move"):
        moves(clip_of(tmp_path, np.zeros((1, 64, 64, 3), np.uint8)), Steps([]))


def test_dis_flow_sees_a_still_and_a_moving_square(tmp_path):
    assert moves(clip_of(tmp_path, square(9, step=0)), DISFlow()) == 0.0
    assert moves(clip_of(tmp_path, square(9, step=1)), DISFlow()) == 0.0  # below 6 * 96 / 256 = 2.25 pixels
    assert moves(clip_of(tmp_path, square(9, step=5)), DISFlow()) == 1.0
    frames = square(2, step=5)
    flow = DISFlow()(frames[0], frames[1])[40:56, 20:32]
    assert np.median(flow[..., 0]) == pytest.approx(5.0, abs=0.5)  # to the right, x first
    assert np.median(flow[..., 1]) == pytest.approx(0.0, abs=0.5)
    with pytest.raises(ValueError, match="cannot take 4x4 pixels"):
        DISFlow()(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8))


def test_smoothness_is_how_well_every_second_frame_is_put_back():
    frames = [np.full((4, 4, 3), value, np.uint8) for value in (0, 100, 50, 10, 90, 7)]
    asked = []

    def mean(first, last):
        asked.append((int(first[0, 0, 0]), int(last[0, 0, 0])))
        return (first.astype(float) + last) / 2

    # 25 put back for 100, 70 for 10; the last frame has no pair
    assert smoothness(frames, mean) == pytest.approx(1 - (75 + 60) / 2 / 255)
    assert asked == [(0, 50), (50, 90)]
    for count in (0, 2):
        with pytest.raises(ValueError, match="fewer than three"):
            smoothness(frames[:count], mean)


def test_dis_smoothness_tells_steady_motion_from_a_jerk():
    between = DISFlow().between
    assert smoothness(square(9, step=0), between) == pytest.approx(1.0, abs=2e-3)
    steady = square(9, step=4)
    jerky = steady[[0, 2, 2, 4, 4, 6, 6, 8, 8]]  # the same way, every second frame held
    assert smoothness(steady, between) > 0.985
    assert smoothness(jerky, between) < smoothness(steady, between) - 0.004
    put_back = between(steady[0], steady[2])
    behind = np.abs(put_back - steady[1].astype(np.float32))[30:66, 10:40].mean()
    assert behind < 0.3 * np.abs(steady[0].astype(np.float32) - steady[1])[30:66, 10:40].mean()


WRITTEN_DOWN = ([-5.566286, 4.710756], [1.247033, 1.498513])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return raft.RAFT().eval()


def test_correlations_are_looked_up_around_a_place_x_slowest():
    rows, columns = 16, 24
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    level = (100.0 * y + x).float().expand(rows * columns, 1, rows, columns)
    places = torch.stack([x, y]).float()[None]
    found = raft._looked_up([level], places + torch.tensor([0.5, 0.0]).view(1, 2, 1, 1))[0]
    found = found.view(9, 9, rows, columns)  # x step, y step
    assert found[4, 4, 8, 10] == pytest.approx(810.5)
    assert found[0, 4, 8, 10] == pytest.approx(806.5)
    assert found[4, 0, 8, 10] == pytest.approx(410.5)
    assert found[0, 0, 0, 0] == 0.0  # outside of the picture
    half = F.avg_pool2d(level, 2)
    assert raft._looked_up([level, half], places)[0, 81 + 40, 8, 10] == pytest.approx(
        half[0, 0, 4, 5].item()  # the same place, at half the size
    )


def test_a_flow_of_equal_steps_comes_out_twenty_times_and_eight_times_as_large(network):
    """The last layers set by hand: each step adds (0.5, -0.25), each pixel is the middle one of its nine."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    still = raft.RAFT().eval()
    for name in ("flow_head.conv2", "mask.2"):
        state[f"update_block.{name}.weight"].zero_()
    state["update_block.flow_head.conv2.bias"] = torch.tensor([0.5, -0.25])
    state["update_block.mask.2.bias"] = (
        torch.full((9, 64), -400.0).index_fill(0, torch.tensor(4), 400.0).flatten()
    )
    still.load_state_dict(state)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 65, 70, 3), np.uint8)
    flow = raft.RAFTFlow(still, CPU)(first, second)
    assert flow.shape == (72, 72, 2)
    assert flow[..., 0] == pytest.approx(0.5 * 20 * 8, rel=1e-4)
    assert flow[..., 1] == pytest.approx(-0.25 * 20 * 8, rel=1e-4)
    with pytest.raises(ValueError, match="60x80 pixels; RAFT needs 64"):
        raft.RAFTFlow(still, CPU)(np.zeros((80, 60, 3), np.uint8), np.zeros((80, 60, 3), np.uint8))


def test_the_flow_is_that_of_the_authors_network(network):
    """These numbers were written down when this network and the authors' gave the same flow to 1e-5."""
    draw = torch.Generator().manual_seed(1)
    first = 255.0 * torch.rand(1, 3, 128, 136, generator=draw)
    with torch.no_grad():
        flow = network(first, first.roll((3, 5), (2, 3)))[0]
    assert flow[:, 40, 50].tolist() == pytest.approx(WRITTEN_DOWN[0], rel=1e-3)
    assert [flow[0].std().item(), flow[1].std().item()] == pytest.approx(WRITTEN_DOWN[1], rel=1e-3)


def test_rafts_checkpoint_is_read_under_the_authors_names(network, tmp_path):
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    state["module.cnet.layer2.0.norm3.weight"] = torch.zeros(96)  # the same layer under a second name
    torch.save(state, tmp_path / "raft-things.pth")
    opened = raft.RAFTFlow.open(tmp_path / "raft-things.pth", CPU)
    assert isinstance(opened, raft.RAFTFlow)
    del state["module.fnet.conv2.bias"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="half.pth: is not RAFT's large model: it has no fnet.conv2.bias"):
        raft.RAFTFlow.open(tmp_path / "half.pth", CPU)


def test_vbenchs_smoothness_gets_all_frames_in_order(tmp_path):
    frames = square(12)
    clip = clip_of(tmp_path, frames)

    class Model:
        def motion_score(self, folder):
            found, unreadable = read_folder(motion.Path(folder))
            self.frames = np.concatenate([frame.evenly(1) for frame in found])
            return 0.75

    model = Model()
    assert motion.VBenchSmoothness(model)(clip) == 0.75
    assert np.array_equal(model.frames, frames)
    with pytest.raises(ValueError, match="fewer than three"):
        motion.VBenchSmoothness(model)(clip_of(tmp_path, frames[:2]))
