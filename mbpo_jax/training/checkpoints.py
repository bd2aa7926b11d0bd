"""Orbax checkpoints: the state of a running stage, and the parameters it leaves behind."""

import contextlib
import errno
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from mbpo_jax.nn.stored_arrays import check_readable
from mbpo_jax.types import Params


class Checkpoints:
    """The training states of one run in `directory`, the newest `keep` of them and the best.

    A state is copied to the host, then written in the background, and is there completely or not
    at all: a kill during a save leaves the states before it. Beside it lies a record of its origin
    and of the run's progress. Batches and random keys are functions of (seed, step), so the seed
    in the origin and the step are the position of the data iterator and of the random numbers.

    Args:
        directory: made if absent.
        origin: JSON-able; what the states depend on, e.g. {"config": ..., "seed": ...,
            "normalization": ...}. States of another origin are refused.
        keep: how many of the newest states stay.
        best: name of the evaluation metric whose highest state stays too; None for no metric.

    Raises:
        OSError: the directory cannot be made or written to.
    """

    def __init__(
        self,
        directory: Path,
        origin: Mapping[str, Any] | None = None,
        keep: int = 1,
        best: str | None = None,
    ):
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._origin = json.loads(json.dumps(origin or {}))
        policies, score = [LatestN(keep)], None
        if best is not None:

            def score(metrics):
                return metrics[best]

            policies.append(BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=score,  # without it metrics are not written
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete state, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        progress: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to write a pytree of arrays as the state after `step` steps. On return the arrays
        may be donated; `wait` or the next save tells whether writing succeeded.

        Args:
            progress: JSON-able; what the loop needs beside the state to continue.
            metrics: evaluation of this state, with the metric `best`; None if it has none.

        Raises:
            OSError: this state or the one before cannot be written; earlier ones are kept.
        """
        if step == self.latest_step():
            return
        record = {"origin": self._origin, "progress": progress or {}, "step": step}
        record = json.loads(json.dumps(record))  # written later, when the caller's may have changed
        with self._explained(step):
            self._require_space(state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    record=ocp.args.JsonSave(record),
                ),
                metrics=metrics,
            )

    def wait(self) -> None:
        """Returns when all that was saved is on disk; raises as `save` does."""
        with self._explained(None):
            self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict]:
        """A state with the structure, shapes and shardings of `like`, which may be on another mesh
        than the one that was saved, and its progress.

        Raises:
            ValueError: the state is incomplete or corrupt, or has another origin (the message says
                what differs) or structure.
        """
        step = self.latest_step() if step is None else step
        record = self._record(step)
        changes = differences(record["origin"], self._origin)
        if changes:
            raise ValueError(
                f"the state of step {step} in {self.directory} is of another run:\n"
                + "\n".join(changes)
                + "\nRestore these values, or use another directory"
            )
        return self._restore_arrays(like, step), record["progress"]

    def close(self) -> None:
        """Waits for the writing; raises as `save` does."""
        self.wait()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _record(self, step: int) -> dict:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        try:
            record = self._manager.restore(step, args=args)["record"]
            return {"origin": record["origin"], "progress": record["progress"]}
        except Exception as error:  # whatever the library makes of bytes that are not its own
            raise ValueError(
                f"{self.directory / str(step)} is incomplete or corrupt: its record cannot be read "
                f"({error}); {self._without(step)}"
            ) from error

    def _without(self, step: int) -> str:
        return (
            f"delete {self.directory / str(step)}, and the training goes on from an earlier state "
            "or starts again"
        )

    def _restore_arrays(self, like, step):
        state = epath.Path(self.directory / str(step) / "state")
        check_readable(state, self._without(step))
        args = ocp.args.Composite(state=_pytree_restore(like))
        return self._manager.restore(step, args=args)["state"]

    def _require_space(self, state) -> None:
        """The library reports a directory that it cannot write to minutes later and at length."""
        with tempfile.TemporaryFile(dir=self.directory):
            pass
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        if shutil.disk_usage(self.directory).free < needed:
            self._manager.wait_until_finished()  # the message names the newest complete state
            raise OSError(errno.ENOSPC, f"{needed / 2**20:.0f} MiB are needed and not free")

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        # Tensorstore has no exceptions of its own: an OSError comes as a ValueError.
        except (OSError, ValueError, RuntimeError) as error:
            self._manager.reload()
            kept = self.latest_step()
            raise OSError(
                f"cannot save {'a state' if step is None else f'the state of step {step}'} in "
                f"{self.directory}: {error}. "
                + ("There is no earlier state" if kept is None else f"That of step {kept} is kept")
                + "; free some space there or make it writable, and start again"
            ) from error


def save_params(directory: Path, params: Params) -> None:
    """Writes parameters; replaces what was there only when complete."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory).absolute(), params, force=True)


def best_state(directory: Path, metric: str) -> Path:
    """The folder of the state with the highest `metric` among the `Checkpoints` in `directory`,
    which another process may be writing; `load_params` reads its parameters.

    Raises:
        FileNotFoundError: no state there was evaluated.
    """
    scores = {}
    for path in Path(directory).absolute().glob("*/metrics/metrics"):
        state = path.parents[1] / "state"
        if path.parents[1].name.isdigit() and state.is_dir():
            try:
                scores[state] = json.loads(path.read_text()).get(metric, -math.inf)
            except (ValueError, AttributeError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}): delete {path.parents[1]}"
                ) from error
    if not scores:
        raise FileNotFoundError(
            f"no state in {directory} has its {metric}: only policy optimisation keeps the best, "
            "from its first checkpoint on (--config.rl.checkpoint_every); take the last"
        )
    return max(scores, key=scores.__getitem__)


def load_params(directory: Path, like: Params) -> Params:
    """Reads parameters with the structure, shapes and shardings of `like`, also from a state of
    policy optimisation.

    Raises:
        FileNotFoundError: when the directory does not exist.
        ValueError: when it is incomplete or corrupt, or holds parameters of another model.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"no parameters at {directory}; run the stage that writes them")
    found = check_readable(
        epath.Path(directory),
        f"copy it again from where it came, or delete {directory.parent} and run that stage again",
    )
    if any(key[:2] == ("state", "params") for key in found):
        args = _pytree_restore({"state": {"params": like}}, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(directory, args=args)["state"]["params"]
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory, abstract)


def flat_entries(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested dicts under dotted names."""
    return flatten_dict(tree, sep=".")


def differences(before: Any, now: Any) -> list[str]:
    """A line for each entry in which two nested dicts differ."""
    before, now = flat_entries(before), flat_entries(now)
    return [
        f"  {key}: {before.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "absent") != now.get(key, "absent")
    ]


def _pytree_restore(like: Any, **options) -> ocp.args.PyTreeRestore:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=arguments, **options)
