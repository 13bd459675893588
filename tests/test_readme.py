"""The README's figures are those of figures.json."""

import json

import pytest

from lofa_core import miniature
from training.readme import README, figures_text, write_figures


def test_the_readme_holds_the_shipped_figures():
    shipped = json.loads(miniature.FIGURES.read_text(encoding="utf-8"))
    assert figures_text(shipped) in README.read_text(encoding="utf-8")


def test_writing_replaces_what_stands_between_the_marks_and_nothing_else(tmp_path):
    shipped = json.loads(miniature.FIGURES.read_text(encoding="utf-8"))
    shipped["hypernetwork"]["joint_gap_closed"] = None
    readme = tmp_path / "README.md"
    readme.write_text(
        "above\n<!-- figures -->\n1234.5678\n<!-- end of figures -->\nbelow\n", encoding="utf-8"
    )
    for _ in range(2):
        write_figures(shipped, readme)
        text = readme.read_text(encoding="utf-8")
        assert text.startswith("above\n<!-- figures -->\n| method |") and text.endswith("below\n")
        assert "1234.5678" not in text and "an undefined share on getting" in " ".join(text.split())
        assert text.count(f"{shipped['hypernetwork']['rows']['LoFA']['frechet']:.2f}") >= 1


def test_a_readme_without_marks_is_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n", encoding="utf-8")
    with pytest.raises(ValueError, match="end of figures"):
        write_figures(json.loads(miniature.FIGURES.read_text(encoding="utf-8")), readme)
    assert readme.read_text(encoding="utf-8") == "nothing here\n"
