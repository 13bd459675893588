"""Names that a graph gives to what it saves. Graphs come from strangers."""

MAX_NAME = 200  # bytes of one folder or file; file systems take 255, a number and an ending are added
MAX_PREFIX = 1000  # bytes of all
# What no file's name may hold on Windows; a name that works there works everywhere.
_FORBIDDEN = set('<>:"|?*')
_DEVICES = {
    *("con", "prn", "aux", "nul", "conin$", "conout$"),
    *(f"{device}{number}" for device in ("com", "lpt") for number in "123456789\u00b9\u00b2\u00b3"),
}


def check_name(prefix: str) -> None:
    """Raises ValueError where folders and a file of this name would not lie below the output folder on every
    system: absolute paths, drive letters, `..`, device names, what cannot be written or is too long.
    """
    parts = prefix.replace("\\", "/").split("/")
    for part in parts:
        reason = _why_not(part)
        if reason:
            raise ValueError(
                f"filename_prefix {prefix!r:.100}: {reason}. Expected a name below ComfyUI's output folder, "
                "such as loras/lofa."
            )
    if len(prefix.encode("utf-8", "replace")) > MAX_PREFIX:
        raise ValueError(f"filename_prefix {prefix!r:.100}... is too long, at most {MAX_PREFIX} bytes.")


def _why_not(part: str) -> str:
    """What is wrong with one folder's or file's name; empty where nothing is."""
    if not part:
        return "begins or ends with a slash, has two in a row, or is empty"
    if part in (".", ".."):
        return f"holds {part} as a folder"
    strange = [c for c in part if c in _FORBIDDEN or not c.isprintable()]
    if strange:
        return f"holds {strange[0]!r}"
    if part != part.strip() or part.endswith("."):
        return f"{part!r:.40} begins or ends with a space, or ends with a dot"
    if part.split(".")[0].strip().lower() in _DEVICES:
        return f"{part!r:.40} is a device on Windows"
    if len(part.encode("utf-8")) > MAX_NAME:
        return f"{part[:20]!r}... is longer than {MAX_NAME} bytes"
    return ""
