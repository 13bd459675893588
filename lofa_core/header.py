"""The JSON header of a hypernetwork's file, which says what to build before its weights are read: checked by
types and sizes, for a wrong number in it would otherwise fill the memory.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .descriptions import BaseDescription, ConditionDescription, LayerDescription

MAX_LAYERS = 4096
MAX_SHAPES = 64
MAX_SIZE = 2**20  # of any one number
MAX_BLOCKS = 256
MAX_POSE = 2**25  # pixels of a drawn pose; 81 frames of 832x480 are 32 million
MAX_PADDING = 8192  # tokens

T = TypeVar("T")


def parse_header(text: str) -> dict[str, Any]:
    """The header, of the right shape. Raises ValueError or KeyError."""
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise ValueError("too many levels") from error
    if not isinstance(header, dict):
        raise ValueError(f"a {type(header).__name__}, expected an object")
    return header


def built(kind: type[T], values: Any) -> T:
    """The dataclass `kind` from JSON: every field is there and has its type, sizes are not absurd. Raises
    ValueError naming the field.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{values!r:.40} where an object was expected")
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind) if field.default is MISSING}  # type: ignore[arg-type]
    if not names <= values.keys() <= hints.keys():
        strange = sorted((names - values.keys()) | (values.keys() - hints.keys()))
        raise ValueError(f"{strange[0]!r:.40} is missing or unknown")
    return kind(**{name: _typed(hints[name], value, name) for name, value in values.items()})


def trained_for(header: Mapping[str, Any]) -> tuple[BaseDescription, tuple[ConditionDescription, ...]]:
    """The base model and the conditions of a header. Raises KeyError, TypeError or ValueError."""
    base = header["base"]
    if not 1 <= len(base["layers"]) <= MAX_LAYERS:
        raise ValueError(f"{len(base['layers'])} target layers")
    layers = tuple(_layer(*values) for values in base["layers"])
    if len({layer.shape for layer in layers}) > MAX_SHAPES or len({x.name for x in layers}) < len(layers):
        raise ValueError(f"more than {MAX_SHAPES} shapes of target layers, or one of them twice")
    name, fingerprint = (_typed(str, base[key], key) for key in ("name", "fingerprint"))
    conditions = tuple(_condition(given) for given in header["conditions"])
    if not conditions or len({given.kind for given in conditions}) < len(conditions):
        raise ValueError("no condition, or one kind twice")
    return BaseDescription(name, layers, fingerprint), conditions


def _layer(name: Any, depth: Any, kind: Any, out: Any, into: Any) -> LayerDescription:
    shape = _typed(tuple[int, int], [out, into], "shape")
    if min(shape) < 1:
        raise ValueError(f"a target layer of {shape}")
    return LayerDescription(
        _typed(str, name, "name"), _typed(int, depth, "depth"), _typed(str, kind, "kind"), shape
    )


def _condition(values: Any) -> ConditionDescription:
    if not {"words", "size"} <= values.keys():
        raise KeyError("words or size")
    given = built(ConditionDescription, values)
    if given.width < 1 or given.padded_to > MAX_PADDING or math.prod(given.size) > MAX_POSE:
        raise ValueError(f"a {given.kind} condition of {given.width}, {given.padded_to}, {given.size}")
    if given.size and min(given.size) < 1:
        raise ValueError(f"a pose of {given.size}")
    return given


def _typed(wanted: Any, value: Any, name: str) -> Any:
    """A JSON value as a field's type."""
    if get_origin(wanted) is tuple:
        kinds = get_args(wanted)
        if not isinstance(value, list) or (kinds[-1] is not ... and len(value) != len(kinds)):
            raise ValueError(f"{name} is {value!r:.40}")
        return tuple(_typed(kinds[0], item, name) for item in value)
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise ValueError(f"{name} is {value!r:.40}, expected one of {', '.join(get_args(wanted))}")
        return value
    if wanted is float and type(value) is int:
        value = float(min(abs(value), MAX_SIZE + 1)) * (1 if value > 0 else -1)
    largest = MAX_BLOCKS if name.endswith("blocks") else MAX_SIZE
    if type(value) is not wanted or (isinstance(value, int | float) and not -MAX_SIZE <= value <= largest):
        raise ValueError(f"{name} is {value!r:.40}, expected {wanted.__name__}")
    if wanted is int and value < 0:
        raise ValueError(f"{name} is {value}, expected 0 or more")
    if wanted is str and not (value.isprintable() or name == "coarse_prompt"):
        raise ValueError(f"{name} cannot be printed")
    return value
