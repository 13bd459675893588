"""What every test shares: no network, one thread so that results do not depend on the machine's cores, and
which tests stay together where several processes share them (`make test`).
"""

import os
from collections import Counter

import pytest

# Before transformers or diffusers are imported: a test that wants a download is a test that fails.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

COMFY = "tests/comfy"
# What takes ten seconds or more: what begins last is short, so that all processes end at about the same time.
FIRST = (COMFY, "tests/test_sdxl.py", "tests/test_faces_identity.py", "tests/test_stages.py",
         "tests/test_folder_conditions.py", "tests/test_loop.py", "tests/test_folder_sdxl.py",
         "tests/test_faces_shipped.py", "tests/test_command_line.py")  # fmt: skip


def group(nodeid: str) -> str:
    """A file's tests share what they set up, and those in tests/comfy one ComfyUI."""
    file = nodeid.partition("::")[0]
    return COMFY if file.startswith(f"{COMFY}/") else file


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(group(item.nodeid), len(places)))


def pytest_terminal_summary(terminalreporter):
    """One line for each thing that the tests in tests/comfy need and do not find."""
    skipped = [x for x in terminalreporter.getreports("skipped") if group(x.nodeid) == COMFY]
    for reason, tests in Counter(x.longrepr[2].removeprefix("Skipped: ") for x in skipped).items():
        terminalreporter.write_line(f"{COMFY}: {tests} skipped, {reason}")


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """A small sound file of every kind that is read, by its name."""
    import hostile_files  # imports half of training

    return hostile_files.kinds(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def place(tmp_path, kinds):
    """A folder where all of them are."""
    for kind in kinds.values():
        (tmp_path / kind.name).write_bytes(kind.sound)
    return tmp_path


@pytest.hookimpl(optionalhook=True)  # plain pytest needs no pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Whole groups. `--dist loadgroup` ignores its marks under pytest 9.2 (pytest-xdist #1386)."""
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log)
