"""Memory that is really short: a process that may not have more (RLIMIT_AS) predicts in smaller batches and
says so; where not even one layer fits, it says what to do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lofa_core.memory import out_of_memory

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory this way")

# Limits itself to what it has and so many MB more; prints what came of a prediction of all 16 layers at once.
SCRIPT = """
import ctypes, json, logging, resource, sys
sys.path[:0] = sys.argv[1:3]
import torch
torch.set_num_threads(1)
from dataclasses import replace
from tiny import CONFIG, base_tensors, network, text
from lofa_core.base_models import BaseWeights
from lofa_core.prediction import predict
said = []
logging.getLogger("lofa_core.prediction").addHandler(logging.Handler())
logging.getLogger("lofa_core.prediction").handlers[0].emit = lambda record: said.append(record.getMessage())
net = network(config=replace(CONFIG, grid=(16, 16), width=256, heads=4, mlp_ratio=4))
base, given = BaseWeights.from_tensors(base_tensors()), text()
found = {"whole": predict(net, base, given, batch_size=1)}
ctypes.CDLL(None).malloc_trim(0)  # what is free of the heap would be memory to have, too
with open("/proc/self/statm") as file:
    has = int(file.read().split()[0]) * resource.getpagesize()
limit = has + int(float(sys.argv[3]) * 2**20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    found["short"] = predict(net, base, given, batch_size=16)
except MemoryError as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
    print(json.dumps({"error": str(error), "said": said}))
    sys.exit()
furthest = max((found["short"].lora.delta(n) - found["whole"].lora.delta(n)).abs().max().item()
               for n in found["whole"].lora)
print(json.dumps({"short": found["short"].responses.short_of_memory, "said": said, "furthest": furthest}))
"""


def predicted_with(megabytes: float) -> dict:
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(ROOT / "tests"), str(megabytes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@linux
def test_a_process_with_little_memory_predicts_in_smaller_batches_and_says_so():
    found = predicted_with(40)
    assert 1 <= found["short"] < 16 and found["furthest"] < 1e-4
    assert len(found["said"]) >= 1 and "Not enough memory on cpu; going on with 8 layers" in found["said"][0]


@linux
def test_the_batches_go_down_to_one_layer():
    found = [predicted_with(megabytes) for megabytes in (14, 12, 8)]  # what fits depends on the C library
    (alone, *_) = [one for one in found if one.get("short") == 1]
    assert alone["furthest"] < 1e-4
    assert [words.partition("with ")[2] for words in alone["said"]] == [
        "8 layers at a time.", "4 layers at a time.", "2 layers at a time.", "one layer at a time."
    ]  # fmt: skip


@linux
def test_where_not_even_one_layer_fits_it_says_what_to_do():
    found = predicted_with(0)
    assert "not enough memory on cpu to predict even one layer at a time" in found["error"]
    assert "bfloat16" in found["error"] and len(found["said"]) == 4


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (MemoryError(), True),
        (RuntimeError("could not create a primitive"), True),  # oneDNN
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
            True,
        ),  # Windows
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("could not create a primitive"), False),
    ],
)
def test_what_means_that_memory_ran_out(error, means):
    assert out_of_memory(error) == means
