"""Code in pickles, files that change while they are read, and what the command line says of all of it."""

import json
import os
import subprocess
import sys
import threading

import pytest
from hostile_files import CONFIGS, outcome
from injuries import RAN, code, zip_parts, zipped
from large_files import LARGE
from test_hostile_files import ARCHIVES

from lofa_core import __main__ as command_line
from lofa_core import archives
from lofa_core.archives import load_archive
from lofa_core.safetensors_file import open_safetensors
from training import train

# ------------------------------------------------------------
# Pickles

CODE = f"import os; os.environ['{RAN}'] = '1'"
PICKLES = {
    "reduce": code(CODE),
    "stack_global": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93(\x8c"
    + bytes([len(CODE)]) + CODE.encode() + b"tR.",
    "inst": b"(S" + repr(CODE).encode() + b"\nibuiltins\nexec\n.",
    "obj": b"(cbuiltins\nexec\nX" + len(CODE).to_bytes(4, "little") + CODE.encode() + b"o.",
    "newobj": b"\x80\x02ccollections\nOrderedDict\ncbuiltins\nexec\nX"
    + len(CODE).to_bytes(4, "little") + CODE.encode() + b"\x85R\x81.",
    "build": b"\x80\x02ccollections\nOrderedDict\n)Rcbuiltins\nexec\nX"
    + len(CODE).to_bytes(4, "little") + CODE.encode() + b"\x85Rb.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\nX\2\0\0\0osX\6\0\0\0systemtR.",
    "torch_load": b"\x80\x02ctorch\nload\nX\1\0\0\0x\x85R.",
    "numpy": b"\x80\x02cnumpy.core.multiarray\nscalar\n)R.",
}  # fmt: skip


@pytest.mark.parametrize("attack", PICKLES)
@pytest.mark.parametrize("name", [*ARCHIVES, "h.safetensors"])
def test_code_in_a_pickle_is_never_run(kinds, place, name, attack):
    path = place / name
    path.write_bytes(PICKLES[attack])
    assert outcome(kinds[name], path) == "refused"
    if name in ARCHIVES:
        parts = zip_parts(kinds[name].sound)
        (described,) = (part for part in parts if part.endswith("data.pkl"))
        path.write_bytes(zipped(parts | {described: PICKLES[attack]}))
        with pytest.raises(ValueError, match=f"{name}: holds something else than tensors .*it was not run"):
            kinds[name].read(path)
    assert RAN not in os.environ


def test_the_code_of_these_tests_would_run():
    """Python's own pickle runs it, in a process of its own."""
    script = f"import os, pickle, sys; pickle.load(sys.stdin.buffer); print(os.environ['{RAN}'])"
    done = subprocess.run([sys.executable, "-c", script], input=code(CODE), capture_output=True, check=True)
    assert done.stdout == b"1\n"


# ------------------------------------------------------------
# Files that change while they are read


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def overwritten(path):
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")


@pytest.mark.parametrize("change", [cut, replaced, overwritten])
def test_a_safetensors_file_that_changes_between_two_readings_is_refused(place, change):
    path = place / "base.safetensors"
    file = open_safetensors(path)
    first, *_, last = file
    file.tensor(first)
    change(path)
    with pytest.raises(ValueError, match=r"base\.safetensors was changed while it was read"):
        file.tensor(last)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"base\.safetensors: no such file"):
        file.tensor(first)


@pytest.mark.parametrize(
    ("change", "said"), [(cut, "not where it should be"), (overwritten, "was changed while it was read")]
)
def test_an_archive_that_changes_while_it_is_read_is_refused(place, monkeypatch, change, said):
    path, tensor = place / "stage1.pth", archives._Filled.tensor

    def change_first(self, stored):
        if path.stat().st_mtime_ns != 0:
            change(path)
            os.utime(path, ns=(0, 0))
        return tensor(self, stored)

    monkeypatch.setattr(archives._Filled, "tensor", change_first)
    with pytest.raises(ValueError, match=rf"stage1\.pth: is no whole PyTorch archive \(.*{said}"):
        load_archive(path)


def test_files_that_somebody_keeps_cutting_are_read_or_refused(kinds, place):
    """In a second process's place a thread: a mapped file that shrinks would end this one."""
    ended, found = threading.Event(), set()

    def keep_cutting():
        while not ended.is_set():
            for name in ("h.safetensors", "stage2.pth"):
                sound = kinds[name].sound
                (place / name).write_bytes(sound)
                os.truncate(place / name, len(sound) // 2)

    thread = threading.Thread(target=keep_cutting)
    thread.start()
    try:
        for _ in range(50):
            found |= {outcome(kinds[name], place / name) for name in ("h.safetensors", "stage2.pth")}
    finally:
        ended.set()
        thread.join()
    assert "refused" in found


# ------------------------------------------------------------
# The command line

READING = {
    "h.safetensors": ["predict", "--prompt", "x", "--out", "{out}", "--hypernetwork", "{file}"],
    "base.safetensors": ["predict", "--prompt", "x", "--out", "{out}", "--base", "{file}"],
    "c.safetensors": ["predict", "--condition", "{file}", "--out", "{out}"],
    "stage1.pth": ["convert", "--stage1", "{file}", "--stage2", "{folder}/stage2.pth", "--out", "{out}"],
    "stage2.pth": ["convert", "--stage1", "{folder}/stage1.pth", "--stage2", "{file}", "--out", "{out}"],
    "lora_comfyui.safetensors": ["inspect", "{file}"],
    "base.safetensors.index.json": ["inspect", "{file}"],
}


def spoil(path, how):
    sound = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes({"empty": b"", "cut": sound[: len(sound) // 2], "noise": b"\x93\xff" * 999}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "noise", "folder"])
@pytest.mark.parametrize("name", READING)
def test_the_command_line_ends_with_2_and_one_error(place, capsys, name, how):
    spoil(place / name, how)
    values = {"file": place / name, "folder": place, "out": place / "out.safetensors"}
    assert command_line.main([argument.format(**values) for argument in READING[name]]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("error") == 1 and "Traceback" not in said.err
    assert name in said.err.replace("\n", "") and not (place / "out.safetensors").exists()


@pytest.mark.parametrize("how", ["missing", "cut", "noise", "folder"])
def test_training_ends_with_2_and_one_error(place, capsys, monkeypatch, how):
    path = place / "run.toml"
    path.write_text((CONFIGS / "miniature.toml").read_text() + "\nx = [")
    spoil(path, how)
    if how == "cut":
        path.write_text("steps = [")
    monkeypatch.setattr(sys, "argv", ["train.py", "stage1", "--config", str(path)])
    assert train.main() == 2
    said = capsys.readouterr()
    assert said.err.count("error ") == 1 and "Traceback" not in said.err
    assert path.name in said.err.replace("\n", "")


# ------------------------------------------------------------
# Files that would take time or memory


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads its memory from /proc")
def test_no_file_takes_five_seconds_or_half_a_gigabyte():
    script = CONFIGS.parents[1] / "tests/large_files.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {case: said for case, *said in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == LARGE.keys()
    for case, (what, seconds, megabytes) in found.items():
        assert (what == "refused" or case.startswith("manifest")) and seconds < 5 and megabytes < 500, case
