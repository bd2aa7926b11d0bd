"""Losses or gradients that are not finite: such a step is skipped, three in a row end the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.types import Array

MAX_IN_A_ROW = 3


def skip_nonfinite(step: Callable[..., tuple[Any, dict[str, Array]]]):
    """A pure step `(state, ...) -> (state, metrics)` that leaves the state as it is, but for the
    count of steps `state.step`, where a metric (loss and gradient norms among them) is NaN or
    infinite. Its metrics have `skipped`, 0 or 1, too."""

    def guarded(state, *args):
        new, metrics = step(state, *args)
        finite = jnp.stack([jnp.isfinite(x).all() for x in metrics.values()]).all()
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return kept.replace(step=new.step), metrics | {"skipped": 1.0 - finite}

    return guarded


class NonFiniteGuard:
    """Counts skipped steps in a row and ends the run at the third.

    Args:
        directory: receives the batch of the last of them, `nonfinite_batch_stepI.npz`.
        name: of the training, for the message.
        in_a_row: the count with which an interrupted run continues.
    """

    def __init__(self, directory: Path, name: str, in_a_row: int = 0):
        self._directory, self._name = Path(directory), name
        self.in_a_row = in_a_row
        self._dispatched: tuple[int, Any, Array] | None = None

    def add(self, step: int, batch: Any, skipped: Array) -> None:
        """Notes step number `step`, which may still run, and looks at the one before it, so that
        the device never waits for the host. Raises as `settle` does."""
        self.settle()
        self._dispatched = (step, batch, skipped)

    def settle(self) -> None:
        """Looks at the last step.

        Raises:
            FloatingPointError: it was the third in a row to be skipped.
        """
        if self._dispatched is None:
            return
        step, batch, skipped = self._dispatched
        self._dispatched = None
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row < MAX_IN_A_ROW:
            return
        path = self._directory / f"nonfinite_batch_step{step}.npz"
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(batch))
        np.savez(path, **{jax.tree_util.keystr(key, simple=True): x for key, x in leaves})
        raise FloatingPointError(
            f"{self._name}: the loss or its gradient is not finite in {self.in_a_row} steps in a "
            f"row, the last of them step {step}. These steps changed nothing; the last checkpoint "
            f"in {self._directory} is good. The batch is in {path}: look at it, or lower the "
            "learning rate"
        )
