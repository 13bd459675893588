"""Faces: what is cut out and compared, with detectors of our own, and LPIPS against its definition."""

import numpy as np
import pytest
import torch
from small_onnx import write_detector, write_recogniser
from small_videos import square
from torch.nn import functional as F

from lofa_core.metrics import faces
from lofa_core.metrics.faces import LPIPS, FaceEmbedder, FaceFinder

CPU = torch.device("cpu")


class Detector:
    """Faces at given places, as OpenCV's detector answers."""

    def __init__(self, *boxes):
        self.boxes, self.sizes = boxes, []

    def setInputSize(self, size):
        self.sizes.append(size)

    def detect(self, picture):
        self.picture = picture
        rows = [[*box, *range(10), 0.9] for box in self.boxes]
        return 1, np.array(rows, np.float32) if rows else None


def finder(*boxes):
    made = FaceFinder.__new__(FaceFinder)
    made._opencv, made._detector = faces.opencv(), Detector(*boxes)
    return made


def test_the_largest_face_is_cut_out_as_a_square():
    frame = np.zeros((60, 80, 3), np.uint8)
    frame[10:30, 20:40] = (255, 0, 0)
    found = finder((0, 0, 5, 5), (25, 10, 10, 20), (50, 50, 8, 8))
    crop = found.crop(frame)
    assert crop.shape == (256, 256, 3) and (crop == (255, 0, 0)).all()  # 20 by 20 around the box of 10 by 20
    assert found._detector.sizes == [(80, 60)]
    assert (found._detector.picture[15, 25] == (0, 0, 255)).all()  # OpenCV wants blue first
    assert finder().crop(frame) is None and finder().largest(frame) is None


def test_a_face_at_the_edge_repeats_it():
    frame = np.zeros((40, 40, 3), np.uint8)
    frame[:, :2] = 200
    crop = finder((-10, 0, 20, 20)).crop(frame)
    assert (crop[:, :140] == 200).all() and (crop[:, 180:] == 0).all()


def test_frames_without_a_face_count_for_nothing():
    class Recogniser:
        def alignCrop(self, picture, face):
            return picture, face

        def feature(self, aligned):
            picture, face = aligned
            return np.array([[face[0], *picture[0, 0]]], np.float32)

    embedder = FaceEmbedder.__new__(FaceEmbedder)
    embedder._opencv, embedder._recogniser, embedder._finder = (
        faces.opencv(),
        Recogniser(),
        finder((3, 0, 5, 5)),
    )
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[:] = (1, 2, 4)
    assert embedder.frames(frames) == pytest.approx(np.array([[3, 4, 2, 1]] * 2))
    rows = iter([None, np.array([7.0] * 15)])
    embedder._finder.largest = lambda frame: next(rows)
    found = embedder.frames(frames)
    assert np.isnan(found[0]).all() and found[1] == pytest.approx([7, 4, 2, 1])
    embedder._finder.largest = lambda frame: None
    with pytest.raises(ValueError, match="no face in 2 frames"):
        embedder.frames(frames)


def test_opencvs_own_classes_find_and_compare_faces(tmp_path):
    """Bright squares are the faces, their colours the identities."""
    yunet, sface = write_detector(tmp_path / "yunet.onnx"), write_recogniser(tmp_path / "sface.onnx")
    pink, yellow = (255, 225, 250), (255, 255, 220)
    frames = np.zeros((3, 96, 160, 3), np.uint8)
    frames[0, 32:64, 64:96] = pink
    frames[1, 64:96, 0:32] = yellow
    found = FaceFinder.open(yunet, CPU)
    assert found.largest(frames[0])[:4] == pytest.approx([64, 32, 32, 32])
    assert (found.crop(frames[0]) == pink).all() and (found.crop(frames[1]) == yellow).all()
    assert found.crop(frames[2]) is None
    features = FaceEmbedder.open(yunet, sface, CPU).frames(frames)
    assert np.isnan(features[2]).all()
    for feature, colour in zip(features, (pink, yellow), strict=False):
        assert feature / feature.max() == pytest.approx(np.array(colour) / 255, abs=0.02)  # red first


def test_files_that_are_no_networks_are_named(tmp_path):
    path = tmp_path / "yunet.onnx"
    path.write_bytes(b"no network")
    with pytest.raises(ValueError, match="yunet.onnx: OpenCV cannot read it as a face detector"):
        FaceFinder.open(path, CPU)
    with pytest.raises(ValueError, match="yunet.onnx: OpenCV cannot read it as a face recogniser"):
        FaceEmbedder(finder(), path)


def save_lpips(folder, seed=0):
    """AlexNet's convolutions under torchvision's names, and linear weights under LPIPS's, at random."""
    torch.manual_seed(seed)
    shapes = {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    alexnet = {f"features.{place}.weight": 0.05 * torch.randn(shape) for place, shape in shapes.items()}
    alexnet |= {f"features.{place}.bias": 0.1 * torch.randn(shape[0]) for place, shape in shapes.items()}
    alexnet["classifier.1.weight"] = torch.zeros(2, 2)
    linear = {
        f"lin{n}.model.1.weight": torch.rand(1, shape[0], 1, 1) for n, shape in enumerate(shapes.values())
    }
    paths = folder / "alexnet.pth", folder / "alex.pth"
    for state, path in zip((alexnet, linear), paths, strict=True):
        torch.save(state, path)
    return *paths, alexnet, linear


def test_lpips_is_its_definition(tmp_path):
    alexnet_file, linear_file, alexnet, linear = save_lpips(tmp_path)
    lpips = LPIPS.open(alexnet_file, linear_file, CPU)
    a, b = square(2, side=64, step=9)

    def seen(picture):
        x = torch.from_numpy(picture).double().permute(2, 0, 1)[None] / 255.0
        # ImageNet's mean and deviation of 0..1, as LPIPS rounds them for -1..1
        x = (2.0 * x - 1.0 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        for place, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if place in (3, 6):
                x = F.max_pool2d(x, 3, 2)
            weight, bias = (alexnet[f"features.{place}.{part}"].double() for part in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, stride, padding).clamp(min=0)
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    wanted = sum(
        ((one - other).square() * linear[f"lin{n}.model.1.weight"]).sum(1).mean().item()
        for n, (one, other) in enumerate(zip(seen(a), seen(b), strict=True))
    )
    assert lpips.between(a, b) == pytest.approx(wanted, rel=1e-4) and wanted > 0.01
    assert lpips.between(b, a) == pytest.approx(lpips.between(a, b), rel=1e-6)
    assert lpips.between(a, a) == 0.0


def test_lpips_names_a_file_that_is_not_its(tmp_path):
    alexnet, linear, *_ = save_lpips(tmp_path)
    with pytest.raises(ValueError, match="lin0"):
        LPIPS.open(alexnet, alexnet, CPU)
    with pytest.raises(ValueError, match="features.0"):
        LPIPS.open(linear, linear, CPU)
