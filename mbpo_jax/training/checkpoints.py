"""Orbax checkpoints: the state of a running stage, and the parameters it leaves behind."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from mbpo_jax.types import Params


class Checkpoints:
    """The training states of one stage in `directory`, the newest `keep` of them.

    Saving is atomic: a kill during a save leaves the previous state as the newest.
    """

    def __init__(self, directory: Path, keep: int = 1):
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=False
            ),
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete state, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state) -> None:
        """Writes a pytree of arrays as the state after `step` steps."""
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def restore(self, state):
        """The newest state, with the structure, shapes and shardings of `state`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._manager.restore(
            self._manager.latest_step(), args=ocp.args.StandardRestore(abstract)
        )

    def close(self) -> None:
        self._manager.close()


def save_params(directory: Path, params: Params) -> None:
    """Writes parameters; replaces what was there only when complete."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory).absolute(), params, force=True)


def load_params(directory: Path, like: Params) -> Params:
    """Reads parameters with the structure, shapes and shardings of `like`.

    Raises:
        FileNotFoundError: when the directory does not exist.
        ValueError: when it holds parameters of another model.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"no parameters at {directory}; run the stage that writes them")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory, abstract)
