"""Where there is no ComfyUI, its tests are skipped, and one line says what to do."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_without_comfyui_its_tests_are_skipped_and_one_line_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/comfy/test_page.py", "tests/comfy/test_draws.py", "-q"],
        cwd=ROOT,
        env={**os.environ, "COMFYUI_PATH": str(tmp_path), "COMFYUI_PYTHON": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if "COMFYUI_PATH" in line)
    assert re.fullmatch(r"tests/comfy: \d\d skipped, no ComfyUI here; set COMFYUI_PATH .*", line), line
