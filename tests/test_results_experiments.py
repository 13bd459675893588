"""The experiments' part of docs/RESULTS.md: figures, differences and gaps by hand, missing runs left out."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from training import result_tables, results, results_experiments
from training.result_choices import choices_table, pooled_deviation, verdict
from training.result_figures import Experiments, against, gap_closed, mean_and_spread
from training.result_tables import Choice, Line
from training.results_experiments import section

MEASURES = ("joint", "mean_accuracy", "frechet", "flow_matching", "motion", "diversity")


def row(joint, frechet):
    return dict.fromkeys(MEASURES, 0.5) | {"joint": joint, "frechet": frechet}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "experiments"
    folder.mkdir()
    figures = {
        "base": {"coarse": [(0.0, 10.0), (0.1, 10.0), (0.0, 12.0)]},
        "LoFA": {
            "coarse": [(0.2, 6.0), (0.3, 7.0), (0.4, 5.0)],
            "fine": [(0.5, 4.0), (0.5, 4.0), (0.5, 4.0)],
        },
        "per-task LoRA": {"coarse": [(0.4, 5.0), (0.3, 5.0), (0.4, 4.0)]},
        "per-task LoRA, 30 steps": {"coarse": [(0.1, 8.0), (0.1, 8.0), (0.1, 8.0)]},
        "without response": {"coarse": [(0.1, 8.0), (0.2, 9.0), (0.3, 7.0)]},
        "LoFA, 32 tasks": {"coarse": [(0.1, 9.0)]},
        "threshold 0.01": {"coarse": [(0.25, 6.5), (0.25, 6.5), (0.4, 5.0)]},
    }
    for name, prompts in figures.items():
        count = len(prompts["coarse"])
        seeds = {
            str(seed): {
                "machine": "cpu (test)",
                "rows": {prompt: row(*values[seed]) for prompt, values in prompts.items()},
            }
            for seed in range(count)
        }
        if name == "LoFA":
            names = [
                f"{kind}_cosine"
                for kind in ("stage1", "stage2", "stage2_to_stage1", "mean_map", "small_weight")
            ]
            names += [f"{kind}_centred_cosine" for kind in ("stage1", "stage2", "stage2_to_stage1")]
            for place, one in enumerate(seeds.values()):
                one["response"] = {n: 0.1 * k + 0.01 * place for k, n in enumerate(names)}
                one |= {"seconds": 0.25, "parameters": 1234567}
        (folder / f"{len(list(folder.iterdir()))}.json").write_text(
            json.dumps({"name": name, "seeds": seeds})
        )
    return folder


def test_mean_and_spread_by_hand():
    assert mean_and_spread([], 2) == "" and mean_and_spread([0.5], 2) == "0.50"
    assert mean_and_spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"


def test_differences_are_paired_by_seed_and_bold_beyond_two_standard_errors():
    ours = {seed: {"joint": joint} for seed, joint in enumerate((0.2, 0.3, 0.4))}
    worse = {seed: {"joint": joint} for seed, joint in enumerate((0.1, 0.2, 0.3))}
    assert against(ours, worse, "joint", 3) == "**-0.100 ± 0.000**"
    mixed = {seed: {"joint": joint} for seed, joint in enumerate((0.25, 0.2, 0.45))}
    assert against(ours, mixed, "joint", 2) == "+0.00 ± 0.05"
    assert against(ours, {1: {"joint": 0.5}, 7: {"joint": 9.0}}, "joint", 1) == "+0.2"
    assert against(ours, {7: {"joint": 9.0}}, "joint", 1) == ""


def test_the_gap_is_that_of_the_same_seed(folder):
    found = Experiments(folder)
    lofa = {seed: row(*values) for seed, values in enumerate([(0.2, 6.0), (0.3, 7.0), (0.4, 5.0)])}
    assert gap_closed(found, lofa, "joint") == pytest.approx([0.5, 1.0, 1.0])
    assert gap_closed(found, lofa, "frechet") == pytest.approx([4 / 5, 3 / 5, 7 / 8])


def test_the_page_has_every_table_that_has_runs_and_the_papers_figures_beside_them(folder, tmp_path):
    lines = section(folder, tmp_path)
    text = "\n".join(lines)
    assert "cpu (test)" in text and "### Threshold" in text and "nearest LoRA" not in text
    assert "### Losses of Stage II" not in text  # LoFA alone
    without = next(line for line in lines if line.startswith("| without response | 3 |"))
    cells = [cell.strip() for cell in without.split("|")[1:-1]]
    error = 0.0
    assert cells[2] == "0.200 ± 0.100" and cells[4] == "8.00 ± 1.00"
    assert cells[8:10] == [f"**-0.100 ± {error:.3f}**", f"**+2.00 ± {error:.2f}**"]
    assert cells[-2:] == ["665.4", "0.2117"]
    fine = next(line for line in lines if line.startswith("| LoFA, fine prompt |"))
    assert "0.500 ± 0.000" in fine
    threshold = next(line for line in lines if line.startswith("| 0.01 |"))
    spread = math.sqrt(sum((d - 0.0) ** 2 for d in (0.05, -0.05, 0.0)) / 2 / 3)
    assert f"+0.000 ± {spread:.3f}" in threshold or f"-0.000 ± {spread:.3f}" in threshold
    cosines = next(line for line in lines if line.startswith("| Stage II to Stage I |"))
    assert cosines == "| Stage II to Stage I | 0.210 ± 0.010 | 0.710 ± 0.010 |  | 0.91 |"
    assert "| LoFA | 0.250 ± 0.000 | 1,234,567 |" in lines


def test_deviations_are_pooled_about_each_groups_own_mean():
    assert pooled_deviation([[1.0, 3.0], [10.0], [5.0, 5.0, 8.0], []]) == pytest.approx(math.sqrt(8.0 / 3.0))
    assert pooled_deviation([[1.0], [4.0], []]) is None


@pytest.mark.parametrize(
    "gains, says",
    [
        ((0.5, 0.1), "helps"),
        ((0.1, -0.5), "hurts"),
        ((0.5, -0.5), "one measure helped, one hurt"),
        ((0.1, -0.2), "no difference seen"),  # two errors are not beyond two
    ],
)
def test_what_two_measures_say_together(gains, says):
    assert verdict(gains, (0.1, 0.1)) == says


def test_each_choice_stands_beside_what_becomes_of_tasks_without_it(folder):
    choices = (
        Choice("two stages", (Line("one", "without response"), Line("never run", "nowhere"))),
        Choice("0.02", (Line("0.01", "threshold 0.01"),)),
        Choice("many tasks", (Line("32", "LoFA, 32 tasks"),)),
    )
    table = choices_table(Experiments(folder), choices)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert [row[:3] for row in cells] == [
        ["two stages", "one", "3"],
        ["0.02", "0.01", "3"],
        ["many tasks", "32", "1"],
    ]
    joint = math.sqrt((0.05**2 + 0.05**2) / 4)  # the other rows' differences are all alike, or alone
    frechet = math.sqrt((0.5**2 + 0.5**2) / 4)
    three = math.sqrt(3)
    assert cells[0][3:] == [f"-0.100 ± {joint / three:.3f}", f"+2.00 ± {frechet / three:.2f}", "helps"]
    assert cells[1][3:5] == [f"+0.000 ± {joint / three:.3f}", f"+0.00 ± {frechet / three:.2f}"]
    assert cells[1][5] == "no difference seen"
    assert cells[2][3:] == [f"-0.100 ± {joint:.3f}", f"+3.00 ± {frechet:.2f}", ""]  # of one seed
    alone = (Choice("many tasks", (Line("32", "LoFA, 32 tasks"),)),)
    assert choices_table(Experiments(folder), alone) == []  # one seed has no deviation
    assert "### Choices of the design, one by one" in section(folder, folder.parent)


def test_factors_stand_one_by_one_of_the_seeds_that_tell(folder):
    rows = [row(0.1, 8.0), *(row(0.1, 8.0) | {"right: limb": x, "right: lean": x + 0.1} for x in (0.2, 0.4))]
    seeds = {str(seed): {"machine": "cpu", "rows": {"coarse": one}} for seed, one in enumerate(rows)}
    (folder / "nearest.json").write_text(json.dumps({"name": "nearest LoRA", "seeds": seeds}))
    assert results_experiments.factors_table(Experiments(folder)) == [
        "| | seeds | limb | lean |",
        "|---|---|---|---|",
        "| nearest LoRA | 2 | 0.30 ± 0.14 | 0.40 ± 0.14 |",
    ]


def test_bases_that_were_never_seen_stand_beside_the_first(folder):
    bases = {"a_18": row(0.1, 8.0), "a_19": row(0.3, 10.0)}
    for place, (name, joint) in enumerate((("base, styles", 0.0), ("styles, true W", 0.2))):
        seeds = {"0": {"machine": "cpu", "rows": {"coarse": row(joint, 5.0)}, "bases": bases}}
        (folder / f"bases{place}.json").write_text(json.dumps({"name": name, "seeds": seeds}))
    lines = results_experiments.bases_table(Experiments(folder))
    assert lines[-1] == "| styles | true W | 1 | 0.500 | 0.500 | 5.00 | 9.00 |" and len(lines) == 4


def test_stage_one_is_listed_by_the_loras_that_it_learns_from(folder):
    names = (
        "stage1_centred_cosine", "ridge_map_task_cosine", "stage1_cosine", "mean_map_cosine",
        "stage1_task_cosine", "stage1_often_task_cosine", "trainings",
    )  # fmt: skip
    for count in (128, 32):
        values = (count / 1000, 0.1, 0.8, 0.7, count / 500, 0.3, 8.0)
        response = dict(list(zip(names, values, strict=True))[: 7 if count == 128 else 4])
        seeds = {"0": {"machine": "cpu", "rows": {}, "response": response, "loras": count}}
        described = {"name": f"Stage I, {count} LoRAs", "seeds": seeds}
        (folder / f"maps{count}.json").write_text(json.dumps(described))
    lines = results_experiments.loras_table(Experiments(folder))
    assert "| to 8 trainings | of the most possible | ridge regression of maps |" in lines[0]
    assert lines[3] == "| 128 LoRAs | 128 | 1 | 0.256 |  | 0.300 |  | 0.100 | 0.128 | 0.800 | 0.700 |"
    assert lines[2] == "| 32 LoRAs | 32 | 1 |  |  |  |  | 0.100 | 0.032 | 0.800 | 0.700 |" and len(lines) == 4
    seeds = {
        str(seed): {"machine": "cpu", "rows": {}, "response": {"repeat_task_cosine": 0.16}} for seed in (0, 1)
    }
    (folder / "again.json").write_text(json.dumps({"name": "per-task LoRA, again", "seeds": seeds}))
    # of eight trainings that agree by .16: the root of 8 * .16 / (1 + 7 * .16) = .604
    assert "| 0.256 | 0.640 | 0.300 | 0.386 |" in results_experiments.loras_table(Experiments(folder))[3]
    assert section(folder, folder.parent).count("### Stage I, by the LoRAs that it learns from") == 1


def test_rows_that_share_the_chosen_trainings_noise_are_not_pooled(folder):
    found, line = Experiments(folder), (Line("one", "without response"),)
    near = Choice("0.02", (Line("0.01", "threshold 0.01"),), near=True)
    alone, beside = (choices_table(found, (Choice("two stages", line), *more)) for more in ((), (near,)))
    assert beside[2] == alone[2] and "0.01" in beside[3]
    far = choices_table(found, (Choice("two stages", line), Choice("0.02", near.others)))
    assert far[2] != alone[2]


def test_a_cosine_that_some_seeds_have_is_shown_of_those(folder):
    for path in folder.iterdir():
        whole = json.loads(path.read_text())
        if whole["name"] == "LoFA":
            whole["seeds"]["1"]["response"]["stage1_task_cosine"] = 0.125
            path.write_text(json.dumps(whole))
    lines = results_experiments.response_table(Experiments(folder))
    assert lines[2].split("|")[4].strip() == "0.125" and "±" in lines[2].split("|")[2]


def test_the_spread_of_draws_stands_beside_that_of_tasks(folder):
    spread = {"between_seeds": 0.5, "between_conditions": 0.75, "between_tasks": 1.25}
    seeds = {"0": {"machine": "cpu", "rows": {"coarse": row(0.1, 8.0)}, "spread": spread}}
    (folder / "drawn.json").write_text(json.dumps({"name": "LoRA Diffusion", "seeds": seeds}))
    lines = results_experiments.spread_table(Experiments(folder))
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["0.50", "0.75", "1.25"]


def test_the_plots_are_drawn_where_there_are_two_points(folder, tmp_path):
    lines = section(folder, tmp_path)
    assert "![experiments_tasks](experiments_tasks.png)" in lines
    assert "![experiments_budget](experiments_budget.png)" in lines
    for name in ("tasks", "budget"):
        with Image.open(tmp_path / f"experiments_{name}.png") as picture:
            assert picture.width > 800 and len(np.unique(np.asarray(picture.convert("RGB")))) > 20
    (folder / "5.json").unlink()  # LoFA with 32 tasks
    (tmp_path / "again").mkdir()
    assert "![experiments_tasks](experiments_tasks.png)" not in section(folder, tmp_path / "again")


def test_the_command_puts_them_behind_the_other_tables(folder, tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    rows = {"LoFA": dict.fromkeys(("joint", "mean_accuracy", "frechet", "flow_matching"), 0.25)}
    (tmp_path / "text" / "evaluation.json").write_text(json.dumps({"condition": "text", "rows": rows}))
    out = tmp_path / "RESULTS.md"
    arguments = [f"text={tmp_path / 'text'}", "--experiments", str(folder), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["results", *arguments])
    assert results.main() == 0
    page = out.read_text()
    assert page.index("Each condition alone") < page.index("## Experiments") < page.index("### Methods")
    assert f"--experiments {folder}" in page


def test_tables_have_as_many_of_the_papers_figures_as_headings():
    for table in result_tables.TABLES:
        assert {len(line.paper) for line in table.lines} <= {0, len(table.paper)}
