"""Names that a graph gives to what it saves: those that lie below the output folder on every system."""

import importlib.util
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# By its path: the package beside it needs ComfyUI.
_SPEC = importlib.util.spec_from_file_location("names", Path(__file__).parents[1] / "nodes/names.py")
names = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(names)

REFUSED = [
    # absolute
    *("/etc/passwd", "//server/share/x", "/", "\\Windows\\x", "\\\\server\\share\\x"),
    # drives, devices by their long names, streams
    *("C:/x", "C:\\x", "C:x", "c:", "loras/C:/x", "\\\\?\\C:\\x", "\\\\.\\PhysicalDrive0", "//?/C:/x"),
    *("x:stream", "loras/x::$DATA"),
    # parents
    *("..", "../x", "loras/../../x", "loras\\..\\..\\x", "x/..", ".", "./x", "x/./y", ".. /x", "../"),
    # dots and spaces at an end, which Windows takes off
    *("x.", "x..", "x ", " x", "loras /x", "loras./x", "...", "x/. ./y"),
    # nothing
    *("", " ", "/", "x//y", "x/", "\\"),
    # what is not seen, or turns the text around
    *("x\0y", "x\ny", "x\ry", "x\x1b[2Jy", "x\x7fy", "x\x85y", "x\u2028y"),
    *("x\u202egnp.exe", "x\u200by", "\ufeffx", "x\ud800y"),
    # wildcards and pipes
    *("x*", "x?", "x|y", "x<y", "x>y", 'x"y'),
    # devices
    *("CON", "con", "NUL.txt", "nul.tar.gz", "loras/AUX/x", "prn", "COM1", "lpt9.safetensors", "COM\u00b9"),
    *("CONIN$", "con .txt", "NUL/x"),
    # too long
    *("x" * 201, "\u00e4" * 101, "x/" * 501 + "x", "x" * 5000, ("x" * 100 + "/") * 41 + "x"),
]


@pytest.mark.parametrize("prefix", REFUSED)
def test_a_name_that_could_lie_elsewhere_is_refused(prefix):
    with pytest.raises(ValueError, match="filename_prefix .*(Expected a name below|is too long)") as error:
        names.check_name(prefix)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


@pytest.mark.parametrize(
    "prefix",
    [
        *("lofa", "loras/lofa", "loras\\lofa", "a/b/c/d", "x y/z", "%date%/%width%x%height%", "~/x", "-rf"),
        *(
            "\u732b\u306e\u7d75/\u4e00\u679a",
            "caf\u00e9",
            "\U0001f408",
            "x.y.z",
            ".hidden",
            "console",
            "com0",
        ),
        # What looks like /, \, .. or : and is none of them.
        *("loras\u2215x", "loras\uff0fx", "loras\u29f5x", "\uff0e\uff0e/x", "C\uff1a/x"),
        *("x" * 200, "x/" * 400 + "x"),
    ],
)
def test_a_name_that_lies_below_on_every_system_is_accepted(prefix):
    names.check_name(prefix)
    for path in (PurePosixPath("out", prefix.replace("\\", "/")), PureWindowsPath("out", prefix)):
        assert path.parts[0] == "out" and ".." not in path.parts
    assert len(PureWindowsPath(prefix).parts) == 1 + prefix.count("/") + prefix.count("\\")


NASTY = st.sampled_from(
    [*"/\\.: \0\n~$%?*|<>\"'x\u00b9\uff0f\u2215\u202e", "..", "CON", "nul", "COM1", "C:", "x" * 120, "\ud800"]
)


@settings(derandomize=True, max_examples=1000, deadline=None)
@given(prefix=st.lists(NASTY, max_size=8).map("".join) | st.text(max_size=12))
def test_whatever_is_accepted_lies_below_by_both_systems_rules(prefix):
    try:
        names.check_name(prefix)
    except ValueError:
        return
    windows, posix = PureWindowsPath(prefix), PurePosixPath(prefix)
    for path in (windows, posix):
        assert not path.anchor and not path.drive and ".." not in path.parts
        assert all(len(part.encode()) <= 255 for part in path.parts) and len(str(path).encode()) < 4096
    assert not any(PureWindowsPath(part).is_reserved() for part in windows.parts)
    assert all(part == part.rstrip(" .") for part in windows.parts)
    assert prefix.isprintable()
