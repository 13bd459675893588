"""docs/RESULTS.md: every figure stands where it belongs, and runs that are not there are left out."""

import json

import pytest

from training import results


def row(start):
    names = ("joint", "mean_accuracy", "frechet", "flow_matching")
    return {name: start + 0.1 * place for place, name in enumerate(names)}


def run(start, kind="text", **more):
    rows = {"base": row(0.9), "LoFA": row(start), "LoFA, pose": row(start + 0.05)}
    return {"condition": kind, "rows": rows, **more}


LOOKS = {"condition": "style", "rows": {"LoFA": row(0.7)}}
IDENTITY = {
    "people": 2,
    "each": 3,
    "rows": {
        name: {
            "identity_similarity": at, "diversity": at + 1, "diversity_real": 4.5, "frechet": at + 2,
            "factors_right_mean": at + 0.1, "proportions_r2": at + 0.2,
            "scenes": {
                "identity_similarity": at + 0.3, "attributes_right": at + 0.4, "diversity": at, "frechet": at,
            },
        }
        for name, at in (("base", 0.1), ("LoFA", 0.5), ("end to end", 0.2))
    },
    "scene_guidance": 3.0,
    "hybrid": [
        {
            "method": name, "w_base": 3.0, "w_subject": 4.5, "identity_similarity": at, "diversity": at + 1,
            "attributes_right": at + 0.2, "frechet": at + 2,
        }
        for name, at in (("end to end", 0.3), ("LoFA", 0.6))
    ],
    "seconds": {"LoFA": 0.25},
}  # fmt: skip


def test_each_condition_is_compared_with_the_network_for_it_alone():
    runs = {"text": run(0.2), "all": run(0.4, looks=LOOKS)}
    lines = results.conditions_table(runs)
    assert "| text | for it alone | 0.200 | 0.300 | 0.40 | 0.5000 |" in lines
    assert "| text | for all | 0.400 | 0.500 | 0.60 | 0.7000 |" in lines
    assert "| | for all / alone | 2.00 | 1.67 | 1.50 | 1.40 |" in lines
    assert "| pose | for all | 0.450 | 0.550 | 0.65 | 0.7500 |" in lines
    assert "| style | for all | 0.700 | 0.800 | 0.90 | 1.0000 |" in lines
    assert len(lines) == 2 + 3 + 1 + 1


def test_networks_with_fewer_and_more_loras_stand_beside_them():
    runs = {"text": run(0.2), "all": run(0.4, looks=LOOKS), "fewer": run(0.3), "more": run(0.6)}
    lines = results.conditions_table(runs)
    assert "| text | for all, 32 LoRAs | 0.300 | 0.400 | 0.50 | 0.6000 |" in lines
    assert "| text | for all, 128 LoRAs | 0.600 | 0.700 | 0.80 | 0.9000 |" in lines
    assert "| | for all / alone | 2.00 | 1.67 | 1.50 | 1.40 |" in lines
    assert not [line for line in lines if "style" in line and "128" in line]  # it was not shown looks
    page = results.document(runs, "made so")
    assert "32 and 32, or 128 and 128" in page and "| LoFA | 0.400 |" in page
    del runs["more"], runs["fewer"]
    assert "128" not in results.document(runs, "made so")


def test_identity_has_its_seconds_where_they_were_measured():
    table = results.identity_table(IDENTITY)
    assert table[-2] == "| LoFA | 0.500 | 1.50 | 0.600 | 0.70 | 2.50 | 0.800 | 0.900 | 0.25 |"
    assert table[-3].startswith("| base | 0.100 |") and table[-3].endswith("| 0.500 |  |")


def test_each_guided_lora_stands_under_plain_cfg_first():
    assert results.hybrid_table(IDENTITY)[2:] == [
        "| LoFA | CFG 3 | 0.800 | 0.900 | 0.50 | 0.50 |",
        "| LoFA | HM-CFG, w_base 3, w_subject 4.5 | 0.600 | 0.800 | 1.60 | 2.60 |",
        "| end to end | CFG 3 | 0.500 | 0.600 | 0.20 | 0.20 |",
        "| end to end | HM-CFG, w_base 3, w_subject 4.5 | 0.300 | 0.500 | 1.30 | 2.30 |",
    ]


def test_the_page_is_written_from_the_runs_that_are_named(tmp_path, monkeypatch):
    for name, found in (("all", run(0.4, looks=LOOKS)), ("identity", {"identity": IDENTITY})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps(found))
    out = tmp_path / "RESULTS.md"
    (tmp_path / "condition_text_style.png").touch()
    arguments = [f"{name}={tmp_path / name}" for name in ("all", "identity")]
    monkeypatch.setattr("sys.argv", ["results", *arguments, "--out", str(out)])
    assert results.main() == 0
    page = out.read_text()
    assert "### Looks" in page and "2 people whom neither" in page and "diversity of 4.50" in page
    assert "Text and style:\n\n![condition_text_style](condition_text_style.png)" in page
    assert page.count("](condition_") == 1  # those that are there
    assert "for it alone |" not in page and "Text and style at once" not in page


@pytest.mark.parametrize("wrong", ["smell=runs", "text", "text=nowhere"])
def test_what_is_no_evaluated_run_is_named(wrong, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["results", wrong])
    with pytest.raises(SystemExit):
        results.main()
    told = capsys.readouterr().err
    assert f"{wrong}: expected one of text, pose, style, all, fewer, more, identity" in told
