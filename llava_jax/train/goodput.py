"""Goodput: where the seconds of a run went, every one of them in one bucket."""

import time

BUCKETS: tuple[str, ...] = ("start", "data", "step", "save", "eval")


class Clock:
    """Each `lap` puts the time since the one before into a bucket, so that nothing is left out or counted twice.

    start: measuring, restoring and compiling; data: waiting for a batch; step: waiting for the device, and telling
    about it; save: copying a checkpoint off the devices (it is written while steps go on); eval: held-out records.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._since_taken = dict.fromkeys(BUCKETS, 0.0)
        self.total = dict.fromkeys(BUCKETS, 0.0)

    def lap(self, bucket: str) -> None:
        now = time.perf_counter()
        self._since_taken[bucket] += now - self._last
        self.total[bucket] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds of each bucket since the last time that they were taken."""
        taken, self._since_taken = self._since_taken, dict.fromkeys(BUCKETS, 0.0)
        return taken
