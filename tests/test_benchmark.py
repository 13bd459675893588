"""The benchmark's arithmetic and its contract, at a small size; what it measures is no test's business."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from test_released import SMALL, released
from tiny import text
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training import benchmark, full_size, lora_benchmark
from training.config import LoRAConfig


@pytest.mark.parametrize("made", [released(), released(replace(SMALL, cls_token=False))])
def test_the_counted_work_is_what_pytorch_counts_with_the_text_once(monkeypatch, made):
    small_world(monkeypatch)
    weights, index = torch.randn(16, 16, 16), torch.arange(16)
    # The fused kernels' products are not counted on a CPU, those of the plain formula are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made(weights, index, text(tokens=torch.randn(1, 5, 6)))
    assert benchmark.prediction_flop(made.config, 16, 5) == pytest.approx(
        counter.get_total_flops(), rel=0.001
    )


def small_world(monkeypatch):
    monkeypatch.setattr(full_size, "RELEASED", SMALL)
    for module in (full_size, benchmark):
        monkeypatch.setattr(module, "SIDE", 16)
        monkeypatch.setattr(module, "TEXT_WIDTH", 6)
    small = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "ffn_dim": 32, "text_dim": 6}
    monkeypatch.setattr(full_size, "WAN_1_3B", small)


def test_json_is_one_object_with_the_promised_keys_and_nothing_else(monkeypatch, capsys):
    small_world(monkeypatch)
    monkeypatch.setattr("sys.argv", ["benchmark", "predict", "--json", "--layers", "8", "--dtype", "float32"])
    assert benchmark.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "layers", "dtype", "device", "seconds", "gflop", "gflops_per_s", "matmul_gflops_per_s",
        "share_of_matmul_rate", "peak_memory_bytes",
    ]  # fmt: skip
    assert found["layers"] == 8 and found["dtype"] == "float32" and found["peak_memory_bytes"] > 2**20
    assert all(found[key] >= 0 for key in list(found)[3:])


def test_the_table_says_how_many_layers_were_measured(monkeypatch, capsys):
    small_world(monkeypatch)
    monkeypatch.setattr(
        "sys.argv", ["benchmark", "predict", "--layers", "3", "--batch", "2", "--dtype", "float32"]
    )
    assert benchmark.main() == 0
    words = capsys.readouterr().out
    assert "3 of 240" in words and "share of that rate" in words


@pytest.mark.parametrize("layers", ["0", "241", "-3"])
def test_a_number_of_layers_that_is_not_there_is_refused(monkeypatch, capsys, layers):
    monkeypatch.setattr("sys.argv", ["benchmark", "predict", "--layers", layers])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "expected 1 to 240" in capsys.readouterr().err


def test_loras_are_trained_both_ways_and_compared(monkeypatch, capsys):
    small = ["--tasks", "2", "--steps", "1", "--batch", "1", "--repeats", "1", "--processes", "1"]
    monkeypatch.setattr("sys.argv", ["benchmark", "lora-dataset", "--json", *small])
    assert benchmark.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        "tasks", "steps", "batch", "rank", "seconds_peft_one_by_one", "seconds_together", "speedup",
        "processes", "device", "dtype",
    ]  # fmt: skip
    assert (found["tasks"], found["steps"], found["batch"], found["dtype"]) == (2, 1, 1, "float32")
    ratio = found["seconds_peft_one_by_one"] / found["seconds_together"]
    assert found["speedup"] == pytest.approx(ratio, rel=0.05)
    Console().print(lora_benchmark.table(found))
    assert "one by one, PEFT" in capsys.readouterr().out


def test_processes_share_the_benchmarks_tasks(monkeypatch):
    shares = []

    class Pool:
        def submit(self, work, device, dtype, clips, settings):
            shares.append(list(clips))
            return self

        def result(self):
            return None

    clips = lora_benchmark._clips(5)
    lora_benchmark._train_apart(Pool(), 3, torch.device("cpu"), torch.float32, clips, LoRAConfig())
    assert shares == [["task 0", "task 3"], ["task 1", "task 4"], ["task 2"]]


def test_numbers_below_one_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "lora-dataset", "--tasks", "0"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--tasks 0: expected 1 or more" in capsys.readouterr().err
