"""How long ComfyUI takes for something, on a machine that others use too."""

import time
from pathlib import Path


class Clock:
    """Seconds since it was made, without those in which ComfyUI's busiest thread was ready to run and other
    programs had the processors (Linux counts them).
    """

    def __init__(self, pid: int):
        self.pid, self.started = pid, time.monotonic()
        self.before = self._threads()

    def seconds(self) -> float:
        passed, waited = time.monotonic() - self.started, []
        for thread, (ran, waits) in self._threads().items():
            ran_before, waits_before = self.before.get(thread, (0, 0))
            waited.append((ran - ran_before, waits - waits_before))
        return passed - max(waited, default=(0, 0))[1] / 1e9

    def _threads(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds that each thread ran, and waited for a processor."""
        files = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        counts = {file.parent.name: file.read_text().split() for file in files}
        return {thread: (int(ran), int(waited)) for thread, (ran, waited, _) in counts.items()}
