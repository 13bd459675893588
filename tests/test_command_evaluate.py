"""`python -m lofa_core evaluate`: what is measured, skipped and left out, and what is said of it."""

import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from small_videos import square, write_picture, write_video
from test_metrics_faces import save_lpips
from test_metrics_models import save_clip, save_csd, save_dino

from lofa_core.__main__ import main
from lofa_core.metrics import evaluation, faces
from lofa_core.metrics.clips import Clip, read_folder, references_of
from lofa_core.metrics.distances import cosine, frechet_distance
from lofa_core.metrics.embedders import CLIP
from lofa_core.metrics.evaluation import METRICS, Material, Metric, evaluate
from lofa_core.metrics.weights import WEIGHTS, Weights

CPU = torch.device("cpu")


def material(videos, references=(), prompts=None, weights=(), frames=4):
    return Material(
        videos, references, references_of(videos, references), prompts, Weights(dict(weights)), frames
    )


def measured(name, given):
    (result,) = evaluate(given, [metric for metric in METRICS if metric.name == name])
    return result


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip"), save_dino(folder / "dino"), save_csd(folder / "csd.pth")
    return {"clip": folder / "clip", "dino": folder / "dino", "csd": folder / "csd.pth"}


@pytest.fixture
def videos(tmp_path):
    """Two that move, one that does not, a broken one; references of the first two, one of them the same."""
    write_video(tmp_path / "out" / "1.avi", square(16, step=5, side=128))
    write_video(tmp_path / "out" / "2.avi", square(16, step=4, side=128, seed=1))
    write_video(tmp_path / "out" / "3.avi", square(16, step=0, side=128, seed=2))
    (tmp_path / "out" / "4.avi").write_bytes(b"broken")
    write_video(tmp_path / "real" / "1.avi", square(16, step=5, side=128))
    write_video(tmp_path / "real" / "2.avi", square(16, step=3, side=128, seed=5)[:, :, ::-1].copy())
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\na pig\n")
    return tmp_path


def run(folder, *more, capsys):
    code = main(["evaluate", "--videos", str(folder / "out"), *map(str, more)])
    return code, capsys.readouterr()


def test_all_is_measured_that_can_be_and_the_rest_is_named(videos, models, capsys):
    given = [part for name, path in models.items() for part in ("--weights", f"{name}={path}")]
    code, said = run(
        videos, "--reference", videos / "real", "--prompts", videos / "prompts.txt",
        *given, "--weights", f"raft={videos}/gone.pth", "--json", videos / "figures.json", "--frames", "4",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, said.err
    report = json.loads((videos / "figures.json").read_text())
    assert set(report["metrics"]) | set(report["left_out"]) == {metric.name for metric in METRICS}
    assert set(report["metrics"]) == {
        "clip_t", "clip_i", "dino", "csd", "dynamic_degree_dis", "motion_smoothness_dis"
    }  # fmt: skip
    for name in ("clip_i", "dino", "csd"):
        found = report["metrics"][name]
        assert found["by_video"]["1"] == pytest.approx(1.0) and found["by_video"]["2"] < 1 - 1e-4
        assert found["value"] == pytest.approx(np.mean(list(found["by_video"].values())))
        assert found["skipped"] == {"3": "has no reference of its name."}
    assert report["metrics"]["dynamic_degree_dis"]["by_video"] == {"1": 1.0, "2": 1.0, "3": 0.0}
    assert report["metrics"]["dynamic_degree_dis"]["value"] == pytest.approx(2 / 3)
    assert report["metrics"]["motion_smoothness_dis"]["by_video"]["3"] == pytest.approx(1.0, abs=2e-3)
    assert set(report["metrics"]["clip_t"]["by_video"]) == {"1", "2", "3"}
    assert list(report["unreadable_videos"]) == ["4"]
    assert "gone.pth: no such file" in report["left_out"]["dynamic_degree"]
    assert report["left_out"]["fvd"].startswith("no weights: --weights i3d=PATH")
    assert report["weights"]["dino"] == str(models["dino"])
    assert "3 videos, 2 references" in said.out
    assert "unreadable videos: 4 (4.avi: no frame of this video can be decoded)" in said.out
    assert "skipped: 3 (has no reference of its name)" in said.out
    assert "left out: FVD (no weights: --weights i3d=PATH" in said.out
    assert "left out: Face similarity" in said.out


def test_without_reference_prompts_and_weights_motion_is_still_measured(videos, capsys):
    code, said = run(videos, capsys=capsys)
    assert code == 0
    assert "Dynamic Degree, DIS flow" in said.out and "0.6667 over 3 (higher is better)" in said.out
    assert "left out: CLIP-T (no --prompts)" in said.out and "left out: DINO (no --reference)" in said.out
    assert "left out: Dynamic Degree (no weights: --weights raft=PATH, raft-things.pth)" in said.out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--weights", "vgg=x"], "expected NAME=PATH with NAME one of i3d"),
        (["--weights", "clip="], "expected NAME=PATH"),
        (["--frames", "0"], "not 1 or more"),
        (["--json", "figures.txt"], "must end in .json"),
        (["--prompts", "gone.txt"], "gone.txt"),
        (["--reference", "gone"], "gone: no such folder"),
        (["--device", "abacus"], "unknown"),
    ],
)
def test_wrong_options_get_one_error(videos, capsys, more, message):
    try:
        code, said = run(videos, *more, capsys=capsys)
    except SystemExit as stop:
        code, said = stop.code, capsys.readouterr()
    assert code == 2 and message in said.err and said.err.count("error:") == 1


def test_nothing_that_can_be_measured_is_an_error(tmp_path, capsys):
    write_picture(tmp_path / "out" / "1.png", square(1)[0])
    code, said = run(tmp_path, capsys=capsys)
    assert code == 2 and "no metric could be measured" in said.err
    assert "nothing can move" in said.out  # a picture has no motion
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", "--videos", str(tmp_path / "empty")]) == 2
    assert "holds no video" in capsys.readouterr().err


def test_help_names_every_metric_and_every_file_of_weights(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = capsys.readouterr().out
    assert all(metric.title in said for metric in METRICS) and all(name in said for name in WEIGHTS)
    assert {name for metric in METRICS for name in metric.weights} == set(WEIGHTS)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_clip_t_is_the_mean_cosine_of_prompt_and_frames(videos, models):
    clips, _ = read_folder(videos / "out")
    prompts = {"1": "a cat", "3": "a cow"}
    result = measured("clip_t", material(clips, prompts=prompts, weights=models.items()))
    clip = CLIP.open(models["clip"], CPU)
    by_hand = {
        name: np.mean(
            [cosine(clip.frames(frame[None]), clip.sentences([prompts[name]]))[0] for frame in frames]
        )
        for name, frames in ((video.name, video.evenly(4)) for video in clips if video.name in prompts)
    }
    assert result.by_video == pytest.approx(by_hand, rel=1e-5)
    assert result.value == pytest.approx(np.mean(list(by_hand.values())))
    assert result.skipped == {"2": "has no prompt."}


class Pixels:
    """In place of an embedder: a frame's first pixel; 99 stands for no face."""

    def frames(self, frames):
        found = frames[:, 0, 0].astype(float)
        return np.where(found[:, :1] == 99, np.nan, found)


def similarity(videos, references, frames=4):
    metric = Metric(
        "x", "X", "higher", "", lambda *given: evaluation._frame_similarity(lambda device: Pixels(), *given)
    )
    (result,) = evaluate(material(videos, references, frames=frames), [metric])
    return result


def colours(path, *values):
    frames = np.zeros((len(values), 16, 16, 3), np.uint8)
    for frame, value in zip(frames, values, strict=True):
        frame[:] = value
    return write_video(path, frames) if len(values) > 1 else write_picture(path, frames[0])


RED, GREEN, NONE = (200, 0, 0), (0, 200, 0), (99, 99, 99)


def folders(tmp_path):
    return (read_folder(tmp_path / side)[0] for side in ("out", "real"))


def test_frames_are_compared_with_those_of_the_same_place(tmp_path):
    colours(tmp_path / "out" / "same.avi", RED, GREEN, RED, GREEN)
    colours(tmp_path / "real" / "same.avi", RED, GREEN, RED, GREEN)
    colours(tmp_path / "out" / "turned.avi", RED, RED, GREEN, GREEN)
    colours(tmp_path / "real" / "turned.avi", GREEN, GREEN, RED, RED)
    colours(tmp_path / "out" / "short.avi", RED, GREEN)
    colours(tmp_path / "real" / "short.avi", RED, RED, RED, GREEN)  # the first and the last
    colours(tmp_path / "out" / "still.avi", RED, GREEN, GREEN, GREEN)
    colours(tmp_path / "real" / "still.png", RED)  # with all frames
    colours(tmp_path / "out" / "shot.png", RED)
    colours(tmp_path / "real" / "shot.avi", GREEN, RED)  # its first frame
    found = similarity(*folders(tmp_path)).by_video
    assert found == pytest.approx({"same": 1, "turned": 0, "short": 1, "still": 0.25, "shot": 0}, abs=1e-3)


def test_several_references_are_averaged_and_lost_faces_left_out(tmp_path):
    colours(tmp_path / "out" / "ann" / "1.avi", RED, NONE, RED, GREEN)
    colours(tmp_path / "out" / "ann" / "2.png", NONE)
    colours(tmp_path / "real" / "ann" / "a.png", RED)
    colours(tmp_path / "real" / "ann" / "b.png", GREEN)
    result = similarity(*folders(tmp_path))
    assert result.by_video == pytest.approx({"ann/1": 0.5}, abs=1e-3)
    assert result.skipped == {"ann/2": "no frame has a face where its reference has one."}
    only_red = similarity(read_folder(tmp_path / "out")[0], [read_folder(tmp_path / "real")[0][0]])
    assert only_red.by_video == pytest.approx({"ann/1": 2 / 3}, abs=1e-3)


def test_face_diversity_is_within_each_folder(tmp_path, monkeypatch):
    alexnet, linear, *_ = save_lpips(tmp_path)
    (tmp_path / "yunet.onnx").write_bytes(b"")
    looks = square(3, side=64, step=9)
    for name, look in zip(
        ("ann/1", "ann/2", "ann/3", "bob/1", "bob/2", "eve/1"), (*looks, *looks[[0, 0, 1]]), strict=True
    ):
        write_picture(tmp_path / "out" / f"{name}.png", look)
    write_picture(tmp_path / "out" / "bob" / "3.png", np.zeros((64, 64, 3), np.uint8))

    class Finder:
        def crop(self, frame):
            return frame if frame.any() else None

    monkeypatch.setattr(faces.FaceFinder, "open", lambda path, device: Finder())
    given = {"yunet": tmp_path / "yunet.onnx", "alexnet": alexnet, "lpips": linear}
    result = measured("face_diversity", material(read_folder(tmp_path / "out")[0], weights=given.items()))
    lpips = faces.LPIPS.open(alexnet, linear, CPU)
    ann = np.mean([lpips.between(looks[a], looks[b]) for a, b in ((0, 1), (0, 2), (1, 2))])
    assert result.by_video == pytest.approx({"ann": ann, "bob": 0.0})
    assert result.value == pytest.approx(ann / 2) and ann > 0.01
    assert set(result.skipped) == {"eve", "bob/3"} and "no face" in result.skipped["bob/3"]


class Stats:
    def __init__(self, **options):
        self.capture_all, self.rows = False, []

    def get_all(self):
        assert self.capture_all
        return np.concatenate(self.rows)


class CDFVD:
    """cd-fvd's class as this project uses it: three numbers of each video for features."""

    def __init__(self, model, n_real, n_fake, ckpt_path, compute_feats, device):
        assert model in ("i3d", "videomae") and n_fake == n_real == "full" and compute_feats
        if ckpt_path.endswith("damaged.pt"):
            raise pickle.UnpicklingError("no pickle")
        self.seen, self.fake_stats = [], None
        CDFVD.last = self, model, ckpt_path
        sys.stdout.write("Loading the model\n")

    def empty_fake_stats(self):
        self.fake_stats = Stats()

    def add_fake_stats(self, videos):
        assert videos.dtype == np.uint8 and videos.shape[1:] == (16, 256, 256, 3)
        self.seen.append(len(videos))
        self.fake_stats.rows.append(self.features(videos))

    @staticmethod
    def features(videos):
        return np.stack([videos[:, 0].mean((1, 2, 3)), videos[:, 15, 0, 0, 0], videos[:, 7, 0, 255, 1]], 1)


@pytest.fixture
def package(monkeypatch):
    for name, module in (("cdfvd", types.ModuleType("cdfvd")), ("cdfvd.fvd", types.ModuleType("cdfvd.fvd"))):
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["cdfvd.fvd"].cdfvd = CDFVD


def test_fvd_compares_all_videos_with_all_references(tmp_path, package, capsys):
    rng = np.random.default_rng(0)
    sets = {"out": rng.integers(0, 200, (9, 3)), "real": rng.integers(0, 200, (3, 3))}
    for side, values in sets.items():
        for number, value in enumerate(values):
            frames = np.zeros((31, 16, 24, 3), np.uint8)
            frames[:] = value  # the middle square alone is seen
            frames[:, :, :4] = frames[:, :, 20:] = 255
            write_video(tmp_path / side / f"{number:02}.avi", frames)
    write_video(tmp_path / "out" / "short.avi", np.zeros((15, 16, 24, 3), np.uint8))
    (tmp_path / "i3d.pt").write_bytes(b"")
    generated, real = folders(tmp_path)
    result = measured("fvd", material(generated, real, weights={"i3d": tmp_path / "i3d.pt"}.items()))
    values = [np.stack([v.mean(1), v[:, 0], v[:, 1]], 1) for v in sets.values()]
    assert result.value == pytest.approx(frechet_distance(*values, ddof=0), rel=0.02)
    assert result.skipped == {"short": "has 15 frames, FVD needs 16."}
    used, network, path = CDFVD.last
    assert used.seen == [8, 1, 3] and (network, path) == ("i3d", str(tmp_path / "i3d.pt"))
    assert capsys.readouterr().out == ""
    same = measured("fvd", material(real, real, weights={"i3d": tmp_path / "i3d.pt"}.items()))
    assert same.value == pytest.approx(0.0, abs=1e-6)
    measured("fvd_videomae", material(real, real, weights={"videomae": tmp_path / "i3d.pt"}.items()))
    assert CDFVD.last[1] == "videomae"
    few = measured("fvd", material(generated, real[:1], weights={"i3d": tmp_path / "i3d.pt"}.items()))
    assert few.value is None and "9 videos and 1 references" in few.left_out


def test_damaged_weights_leave_out_their_metric_alone(tmp_path, package):
    (tmp_path / "damaged.pt").write_bytes(b"")
    for side in ("out", "real"):
        for number in range(2):
            write_video(tmp_path / side / f"{number}.avi", square(16))
    given = material(*folders(tmp_path), weights={"i3d": tmp_path / "damaged.pt"}.items())
    result = measured("fvd", given)
    assert "damaged.pt: not the weights of i3d that cd-fvd takes (no pickle)" in result.left_out
    assert measured("dynamic_degree_dis", given).value is not None


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "w").write_bytes(b"")
    clip = Clip(tmp_path / "a.png", "a", 1, 0.0)
    names = {"i3d": "cd-fvd", "amt": "vbench"}
    for metric in METRICS:
        if metric.package and metric.package[0] not in sys.modules and metric.weights[0] in names:
            weights = {metric.weights[0]: tmp_path / "w"}
            result = measured(metric.name, material([clip], [clip], weights=weights.items()))
            package = names[metric.weights[0]]
            assert result.left_out == f"no package {package}: pip install {package}"
