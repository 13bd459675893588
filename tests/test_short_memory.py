"""Memory that is really short: a process that may not have more (RLIMIT_AS) predicts in smaller batches, says so,
and where not even one layer fits it says what to do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MB = 2**20

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
