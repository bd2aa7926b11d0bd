"""A profiler trace of some training steps, for TensorBoard's profile page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax


class StepProfiler:
    """Traces the steps from `steps[0]` up to but without `steps[1]`; none if `steps` is empty.

    The trace is written to `directory/tensorboard`, beside the metrics.

    Raises:
        ValueError: `steps` is neither empty nor two increasing numbers.
    """

    def __init__(self, directory: Path, steps: Sequence[int] = ()):
        if steps and not (len(steps) == 2 and 0 <= steps[0] < steps[1]):
            raise ValueError(
                f"profile_steps are the first step to trace and the one after the last, e.g. "
                f"(10, 20), not {tuple(steps)}"
            )
        self._directory = Path(directory) / "tensorboard"
        self._steps = range(*steps) if steps else range(0)
        self._running = False

    def before(self, step: int) -> None:
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """`results` are waited for: a step is traced until the device is done with it."""
        if self._running and step + 1 == self._steps.stop:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
