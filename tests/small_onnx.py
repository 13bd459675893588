"""Two tiny ONNX files that OpenCV's face classes take, written byte by byte: no package onnx is needed.

The detector sees a face in every bright square of the grid of 32 pixels, the recogniser the mean colour.
"""

from pathlib import Path

import numpy as np


def _number(value: int) -> bytes:
    """A varint of protocol buffers."""
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value & (1 << 64) - 1)
    data = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | 2) + _number(len(data)) + data


def _node(operation: str, inputs: list[str], output: str, **attributes: list[int] | int) -> bytes:
    fields = b"".join(_field(1, name) for name in inputs)
    fields += _field(2, output) + _field(3, output) + _field(4, operation)
    for name, value in attributes.items():
        several = isinstance(value, list)
        body = b"".join(_field(8, part) for part in value) if several else _field(3, value)
        fields += _field(5, _field(1, name) + body + _field(20, 7 if several else 2))
    return _field(1, fields)


def _tensor(name: str, values: np.ndarray) -> bytes:
    kind = 7 if values.dtype == np.int64 else 1
    dims = b"".join(_field(1, side) for side in values.shape)
    return _field(5, dims + _field(2, kind) + _field(8, name) + _field(9, values.tobytes()))


def _value(number: int, name: str, sides: tuple[int | str, ...]) -> bytes:
    shape = b"".join(_field(1, _field(1 if isinstance(side, int) else 2, side)) for side in sides)
    return _field(number, _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, shape))))


def _write(path: Path, graph: bytes) -> Path:
    path.write_bytes(_field(1, 8) + _field(8, _field(2, 13)) + _field(7, graph + _field(2, "small")))
    return path


def write_detector(path: Path) -> Path:
    """YuNet's outputs: by stride, certainty of a face and of a thing, box, five landmarks."""
    graph, outputs = b"", []
    for stride in (8, 16, 32):
        pooled = f"pooled_{stride}"
        graph += _node("AveragePool", ["input"], pooled, kernel_shape=[stride] * 2, strides=[stride] * 2)
        bright = np.full((1, 3, 1, 1), (stride == 32) / 765.0, np.float32)
        landmarks = np.array([0.3, 0.3, 0.7, 0.3, 0.5, 0.5, 0.3, 0.7, 0.7, 0.7], np.float32)
        for name, weights, bias in (
            ("cls", bright, np.zeros(1, np.float32)),
            ("obj", bright, np.zeros(1, np.float32)),
            ("bbox", np.zeros((4, 3, 1, 1), np.float32), np.array([0.5, 0.5, 0.0, 0.0], np.float32)),
            ("kps", np.zeros((10, 3, 1, 1), np.float32), landmarks),
        ):
            out = f"{name}_{stride}"
            graph += _tensor(f"{out}_w", weights) + _tensor(f"{out}_b", bias)
            graph += _tensor(f"{out}_s", np.array([1, -1, len(bias)], np.int64))
            graph += _node("Conv", [pooled, f"{out}_w", f"{out}_b"], f"{out}_c", kernel_shape=[1, 1])
            graph += _node("Transpose", [f"{out}_c"], f"{out}_t", perm=[0, 2, 3, 1])
            graph += _node("Reshape", [f"{out}_t", f"{out}_s"], out)
            outputs.append((name, stride, len(bias)))
    graph += _value(11, "input", (1, 3, "height", "width"))
    for kind in ("cls", "obj", "bbox", "kps"):
        for name, stride, width in outputs:
            if name == kind:
                graph += _value(12, f"{name}_{stride}", (1, "places", width))
    return _write(path, graph)


def write_recogniser(path: Path) -> Path:
    graph = _node("GlobalAveragePool", ["data"], "mean") + _node("Flatten", ["mean"], "fc1")
    return _write(path, graph + _value(11, "data", (1, 3, 112, 112)) + _value(12, "fc1", (1, 3)))
