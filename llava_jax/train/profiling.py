"""A profiler trace of some steps, for TensorBoard and Perfetto."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces `steps` (counted from 0) into `DIR/profiles`; does nothing for an empty range."""

    def __init__(self, workdir: str, steps: range):
        self._folder, self._steps = Path(workdir, "profiles"), steps
        self._is_on = False

    def before(self, step: int) -> None:
        """Starts before the first of the steps that this start of the run takes."""
        if step in self._steps and not self._is_on:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True

    def after(self, step: int, results: Any) -> None:
        """Ends after the last one, once its results are there: a step that was given to a device has not run yet."""
        if self._is_on and step + 1 not in self._steps:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
