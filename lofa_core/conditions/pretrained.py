"""Models and tokenizers that transformers reads from a local folder: looked at first, for they come from
strangers, and with one error where they are not what they should be.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..documents import read_json, shown
from ..header import MAX_SIZE
from ..safetensors_file import open_safetensors

# What of a configuration says how large the model is.
_SIZES = {
    *("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "max_position_embeddings", "projection_dim"),
}
# What transformers raises for files that are damaged or something else.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


def open_pretrained(kind: str, folder: Path, what: str, **options: Any) -> Any:
    """The model of this class of transformers, for evaluation. Weights are read from .safetensors alone:
    other files may hold code.

    Raises FileNotFoundError, or ValueError naming the folder where it does not hold `what` as a whole, or
    where transformers is missing.
    """
    check_sizes(folder / "config.json")
    for file in sorted(folder.glob("*.safetensors")):
        open_safetensors(file)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{folder}: needs the package transformers: pip install transformers") from error
    with quiet(transformers), errors_of(folder, what):
        model, report = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(
            f"{folder}: not a complete {what}, {len(report['missing_keys'])} tensors are missing "
            f"({missing}). Copy the folder again."
        )
    return model.eval()


def check_sizes(config: Path) -> None:
    """Raises FileNotFoundError, or ValueError where a configuration's sizes are none of a model."""
    values = read_json(config, "a model's configuration")
    for part in [values, *(values.values() if isinstance(values, dict) else ())]:
        for name in _SIZES & part.keys() if isinstance(part, Mapping) else ():
            if type(part[name]) is not int or not 1 <= part[name] <= MAX_SIZE:
                raise ValueError(f"{config}: {name} is {part[name]!r:.40}, expected a whole number.")
    if not isinstance(values, dict):
        raise ValueError(f"{config}: holds a {type(values).__name__}, expected a model's configuration.")


@contextmanager
def errors_of(folder: Path, what: str) -> Iterator[None]:
    """What is raised within for a damaged file, as a ValueError that names the folder."""
    try:
        yield
    except _DAMAGED as error:
        said = shown(str(error).partition("\n")[0], 200) or type(error).__name__
        raise ValueError(
            f"{folder}: not a {what}, or its files do not fit each other ({said}). Copy the folder again."
        ) from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bar and loading report: what matters of them is raised as an error."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
