"""Training: one loop that survives a kill, for every learner, and the supervised step."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.tree_util import KeyPath

from mbpo_jax.gradients import summed_value_and_grad
from mbpo_jax.training.checkpoints import Checkpoints
from mbpo_jax.training.interruption import Interrupted, deferred
from mbpo_jax.training.metrics import MetricWriter
from mbpo_jax.training.nonfinite import NonFiniteGuard, skip_nonfinite
from mbpo_jax.training.profiling import StepProfiler
from mbpo_jax.training.run import Run
from mbpo_jax.training.sharding import on_mesh, parameter_sharding, shard_batch
from mbpo_jax.types import Array, Params

LossFn = Callable[[Params, Params, Any, Array], tuple[Array, dict[str, Array]]]


@struct.dataclass
class TrainState:
    """Trained parameters, their exponential moving average, the optimiser's state, steps done."""

    params: Params
    ema: Params
    opt_state: Any
    step: Array


@dataclass(frozen=True)
class Training:
    """A supervised training, as a config section describes it.

    matrix_learning_rate: above 0, Muon moves the matrices of layers at this rate.
    gradient_accumulation: slices of a batch whose gradients are computed one after the other.
    ema_decay: of the average of the parameters, which is the result.
    log_every, checkpoint_every: steps.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    ema_decay: float
    log_every: int
    checkpoint_every: int
    gradient_accumulation: int = 1
    matrix_learning_rate: float = 0.0


def make_optimizer(
    training: Training, trainable: Params | None = None
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to 5 % of the peak, and global-norm clipping.

    With a `matrix_learning_rate` the matrices inside stacks of layers are instead moved by Muon
    (orthogonalised momentum, arXiv 2502.16982) at that rate, under the same schedule: models that
    train from scratch get there in about two thirds of the steps.

    Where the tree of bools `trainable` is False there is no optimiser state and no weight decay;
    the gradient is expected to be zero there.
    """

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup, max(training.steps, warmup + 1), 0.05 * peak
        )

    warmup, decay = training.warmup_steps, training.weight_decay
    tx = optax.adamw(schedule(training.learning_rate), b2=0.98, weight_decay=decay)
    if training.matrix_learning_rate:
        muon = optax.contrib.muon(
            schedule(training.matrix_learning_rate),
            weight_decay=decay,
            muon_weight_dimension_numbers=partial(
                jax.tree_util.tree_map_with_path, _matrix_dimensions
            ),
        )
        tx = optax.partition({"matrix": muon, "other": tx}, _layer_matrices)
    if trainable is not None:
        tx = optax.masked(tx, trainable)
    return optax.chain(optax.clip_by_global_norm(training.grad_clip), tx)


# Input and output axes of the matrices in stacks of layers, by a pattern of their names; what is
# left are more matrices of the same kind (layers, and the two halves of a gate).
_MATRICES = (
    (r"encoderblock/.*/(query|key|value)/kernel$", (-3,), (-2, -1)),
    (r"encoderblock/.*/out/kernel$|attn_vec_einsum(_1)?/w$", (-3, -2), (-1,)),
    (r"(q|kv)_einsum(_1)?/w$", (-2,), (-3, -1)),
    (r"(encoderblock|layers)/.*(kernel|gating_einsum|linear)$", (-2,), (-1,)),
)


def _matrix_dimensions(path: KeyPath, x: Array) -> optax.contrib.MuonDimensionNumbers | None:
    name = "/".join(str(entry.key) for entry in path if hasattr(entry, "key"))
    for pattern, inputs, outputs in _MATRICES:
        if re.search(pattern, name):
            return optax.contrib.MuonDimensionNumbers(
                tuple(x.ndim + axis for axis in inputs), tuple(x.ndim + axis for axis in outputs)
            )
    return None


def _layer_matrices(params: Params) -> Params:
    """Which optimiser moves what: "matrix" for the matrices in stacks of layers, else "other"."""

    def label(path: KeyPath, x: Array) -> str:
        return "other" if _matrix_dimensions(path, x) is None else "matrix"

    return jax.tree_util.tree_map_with_path(label, params)


def initial_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, params, tx.init(params), jnp.zeros((), jnp.int32))


def train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float,
    gradient_accumulation: int = 1,
) -> Callable[[TrainState, Params, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """The pure step `(state, frozen, batch, key) -> (state, metrics)`.

    The average starts as the parameters themselves and its decay grows as (1 + step) / (10 + step)
    up to `ema_decay`, so that short runs are not dominated by the initialisation. With
    `gradient_accumulation` above 1 the gradient is the mean of those of as many slices of the
    batch, computed one after the other, each with a key of its own.
    """
    slices = gradient_accumulation

    def step(state: TrainState, frozen, batch, key):
        def slice_loss(params, rows, index):
            slice_key = jax.random.fold_in(key, index) if slices > 1 else key
            loss, metrics = loss_fn(params, frozen, rows, slice_key)
            return loss / slices, metrics

        (loss, metrics), grads = summed_value_and_grad(slice_loss, slices)(state.params, batch)
        metrics = jax.tree.map(lambda x: x.mean(0), metrics)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        # In this form the average of a frozen parameter is that parameter, bit for bit.
        ema = jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), state.ema, params)
        metrics = metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, ema, opt_state, state.step + 1), metrics

    return step


def jit_step(step: Callable, shardings: TrainState) -> Callable:
    """A `train_step` that skips what is not finite, compiled for a state with these shardings,
    whose buffers it reuses."""
    step = on_mesh(skip_nonfinite(step), shardings.step.mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def fit(
    loss_fn: LossFn,
    params: Params,
    frozen: Params,
    batches: Callable[[int], Iterator[Any]],
    training: Training,
    run: Run,
    trainable: Params | None = None,
) -> Params:
    """Trains `params` on a loss and returns their exponential moving average.

    Args:
        loss_fn: `(params, frozen, batch, key) -> (scalar loss, metrics)`.
        frozen: arrays the loss needs that are not trained, e.g. a pretrained autoencoder's.
        batches: `batches(i)` yields the host batches of steps i, i + 1, ...
        trainable: tree of bools like `params`, False where the loss stops the gradient.

    Raises:
        FloatingPointError, Interrupted, OSError: as `repeat`.
    """
    tx = make_optimizer(training, trainable)
    # Straight into its shards: a large model's optimiser state does not fit one device.
    make_state = partial(initial_state, tx=tx)
    shardings = parameter_sharding(jax.eval_shape(make_state, params), run.mesh, run.rules)
    state = jax.jit(make_state, out_shardings=shardings)(jax.device_put(params, shardings.params))
    frozen = jax.device_put(frozen, parameter_sharding(frozen, run.mesh, run.rules))
    slices, base_key = training.gradient_accumulation, jax.random.key(run.seed)
    step_fn = jit_step(train_step(loss_fn, tx, training.ema_decay, slices), shardings)
    stream = None

    def step(i: int, state: TrainState):
        nonlocal stream
        stream = batches(i) if stream is None else stream
        batch, key = next(stream), jax.random.fold_in(base_key, i)
        return *step_fn(state, frozen, shard_batch(batch, run.mesh, slices), key), batch

    return repeat(
        step,
        state,
        run,
        steps=training.steps,
        log_every=training.log_every,
        checkpoint_every=training.checkpoint_every,
        shown=("loss",),
    ).ema


def repeat(
    step: Callable[[int, Any], tuple[Any, dict[str, Array], Any]],
    carry: Any,
    run: Run,
    *,
    steps: int,
    log_every: int,
    checkpoint_every: int,
    shown: Sequence[str],
    prepare: Callable[[int, Any], tuple[Any, dict[str, float]]] = lambda i, carry: (carry, {}),
    like: Callable[[], Any] | None = None,
    best: str | None = None,
) -> Any:
    """The loop of every training: `steps` steps with checkpoints, metrics and profile; returns the
    last carry.

    What a step does depends on its number and the carry alone; therefore a run that is killed and
    started again in the same directory continues from its last checkpoint and ends with the same
    carry and metrics. A step that is not finite changes nothing (`skip_nonfinite`) and is counted
    in the metric `skipped`.

    Args:
        step: `(i, carry) -> (carry, metrics, batch)`; the metrics have `skipped`, the batch is
            written to disk if it turns out to be the end.
        carry: pytree of arrays, all that a checkpoint holds.
        log_every, checkpoint_every: steps between records, and at least between checkpoints.
        shown: names of metrics in the progress bar.
        prepare: `(i, carry) -> (carry, metrics)` before step i, e.g. new data for some steps.
        like: what a restored carry looks like (`Checkpoints.restore`); by default as `carry`.
        best: name of a metric of `prepare`: checkpoints are made where it is known, and beside the
            newest stays the one where it was highest.

    Raises:
        FloatingPointError: three steps in a row were not finite; see `NonFiniteGuard`.
        Interrupted: SIGTERM came; the carry is saved.
        OSError: a checkpoint cannot be written; earlier ones are kept.
    """
    from tqdm import tqdm  # not needed by the training core

    origin = {**run.origin, "seed": run.seed}
    with (
        deferred() as asked_to_stop,
        Checkpoints(run.directory / "checkpoints", origin, run.keep, best) as checkpoints,
        StepProfiler(run.directory, run.profile_steps) as profiler,
    ):
        first, progress = 0, {"window": [], "skipped_in_a_row": 0}
        if checkpoints.latest_step() is not None:
            first = checkpoints.latest_step()
            carry, progress = checkpoints.restore(like() if like else carry)
        window, saved = progress["window"], first
        guard = NonFiniteGuard(run.directory, run.name, progress["skipped_in_a_row"])

        def save(i, metrics=None):
            guard.settle()
            progress = {"window": _on_host(window), "skipped_in_a_row": guard.in_a_row}
            checkpoints.save(i, carry, progress, metrics)

        with MetricWriter(run.directory, first + 1, run.loggers) as writer:
            for i in (bar := tqdm(range(first, steps), run.name, steps, initial=first)):
                carry, known = prepare(i, carry)
                if asked_to_stop(i):
                    save(i, known if best in known else None)
                    checkpoints.wait()
                    raise Interrupted(f"{run.name}: stopped by SIGTERM, saved at step {i}")
                if i - saved >= checkpoint_every and (best is None or best in known):
                    save(i, known or None)
                    saved = i
                profiler.before(i)
                carry, metrics, batch = step(i, carry)
                profiler.after(i, carry)
                guard.add(i, batch, metrics["skipped"])
                window.append(known | metrics)
                if (i + 1) % log_every == 0 or i + 1 == steps:
                    means = _mean_metrics(window)
                    window = []
                    writer.write(i + 1, means)
                    bar.set_postfix({name: f"{means[name]:.4f}" for name in shown})
            save(steps)
    return carry


def _on_host(window: list[dict[str, Array]]) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in metrics.items()} for metrics in jax.device_get(window)]


def _mean_metrics(window: list[dict[str, Array]]) -> dict[str, float]:
    """Means over the steps that were not skipped (all, if all were), and how many were."""
    rows = _on_host(window)
    taken = [row for row in rows if not row["skipped"]] or rows
    means = {k: float(np.mean([row[k] for row in taken])) for k in rows[0]}
    return means | {"skipped": sum(row["skipped"] for row in rows)}
