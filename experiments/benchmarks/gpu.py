"""Times of the released sizes on one accelerator, in minutes and with little installed.

Everything here imports with jax, flax, optax, orbax-checkpoint and chex alone. Parameters are
random. Rows run in a fixed order and are written down one by one, so that a run that is cut off
keeps what it had.
"""

import dataclasses
import gc
import gzip
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import policy as policy_benchmark
from experiments.benchmarks import world_model as world_benchmark
from experiments.benchmarks.flops import program_flops
from experiments.benchmarks.reference_stack import SteppedWorld
from mbpo_jax.mbpo import MBPO, Settings, flattened, imagine
from mbpo_jax.nn.normalization import NormStats
from mbpo_jax.policy.config import FlowConfig, Pi0Config, variants
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.training.loop import Training, initial_state, make_optimizer, train_step
from mbpo_jax.training.nonfinite import skip_nonfinite
from mbpo_jax.types import (
    Demonstration,
    Observation,
    Params,
    Prompt,
    RewardExample,
    Transition,
    WorldState,
)
from mbpo_jax.world_model.composed import ComposedWorld
from mbpo_jax.world_model.config import UMMConfig, variant
from mbpo_jax.world_model.umm_world import Frame

GIB = 2**30
FEWEST_RUNS, MOST_RUNS, SECONDS_OF_RUNS = 5, 50, 2.0
MEMORY_SHARE = "0.93"  # of the device that JAX takes; its default, 0.75, is too little for π0.5
USUAL_SHARE_OF_PEAK = 0.2  # for the estimate of a row's time before it runs

SMALL_SETTINGS = Settings(
    branch_chunks=4,
    group_size=16,
    reward_threshold=0.0,
    anchor_weight=5.0,
    gradient_accumulation=1,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed. The numbers of `small` are those of `configs/libero_long.py:small`.

    compile_seconds: expected of a first compilation, for the time budget.
    train_batches: tried in this order until one fits.
    """

    matrix: int
    compile_seconds: float
    pi05: Pi0Config
    train_batches: tuple[int, ...]
    bagel: UMMConfig
    policy: Pi0Config
    world: UMMConfig
    world_prompt: int = 64
    sft_batch: int = 128
    dynamics_batch: int = 64
    reward_batch: int = 64
    matrix_learning_rate: float = 0.01  # of the world model's step
    branches: tuple[int, ...] = (64, 256, 1024)
    settings: Settings = SMALL_SETTINGS
    minibatch: int = 512  # chunks
    anchors: int = 32


SIZES = ("full", "tiny")


def sizes(name: str) -> Sizes:
    """`full`: what the commands run on GPUs. `tiny`: the same programs in seconds on a CPU."""
    flow = FlowConfig(method="smooth", noise_std=0.08, steps=10)
    if name == "full":
        # Every batch that does not fit costs a compilation.
        largest = 128 if (_memory("bytes_limit") or 0) > 100 * GIB else 32
        return Sizes(
            matrix=16384,
            compile_seconds=30.0,
            pi05=policy_benchmark.sizes()["pi05"],
            train_batches=tuple(b for b in (128, 64, 32, 16, 8, 4, 2, 1) if b <= largest),
            bagel=world_benchmark.sizes()["bagel"],
            policy=dataclasses.replace(variants()["small"], flow=flow),
            world=variant("small"),
        )
    pi05, policy = policy_benchmark.sizes()["tiny"], variants()["micro"]
    bagel, world = world_benchmark.sizes()["tiny"], variant("micro")
    return Sizes(
        matrix=256,
        compile_seconds=1.0,
        pi05=dataclasses.replace(_shallow(pi05), eval_steps=2),
        train_batches=(2, 1),
        bagel=dataclasses.replace(_shallow(bagel), num_timesteps=3),
        policy=dataclasses.replace(_shallow(policy), flow=dataclasses.replace(flow, steps=2)),
        world=_shallow(world),
        world_prompt=16,
        sft_batch=2,
        dynamics_batch=2,
        reward_batch=2,
        branches=(2, 4),
        minibatch=4,
        anchors=2,
        settings=dataclasses.replace(SMALL_SETTINGS, branch_chunks=2, group_size=2),
    )


def _shallow(config: Any) -> Any:
    """The model with one layer in each of its stacks."""
    stacks = {"vision": "depth", "language": "depth", "expert": "depth"}
    stacks |= {"mot": "num_layers", "vit": "num_layers"}
    parts = {
        name: dataclasses.replace(getattr(config, name), **{layers: 1})
        for name, layers in stacks.items()
        if hasattr(config, name)
    }
    return dataclasses.replace(config, **parts)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a row times.

    arguments: makes them; called once the program is compiled and known to fit.
    carries: the first of the results is the next run's first argument, whose memory it takes.
    chunks: imagined by a run.
    """

    function: Callable
    arguments: Callable[[], tuple]
    carries: bool = False
    chunks: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """`work(params, batch)` for the first of `batches` that fits the device."""

    work: Callable[[Params, int], Work]
    batches: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that share parameters."""

    params: Callable[[], Params]
    rows: Mapping[str, Row]


class Skipped(Exception):
    """Why a row was not measured."""


class TooLarge(Skipped):
    """A program that does not fit the device."""


def groups(sizes: Sizes) -> tuple[Group, ...]:
    """All rows in the order in which they run."""
    pi05 = policy_benchmark.build(sizes.pi05)
    bagel = world_benchmark.build(sizes.bagel, SteppedWorld)
    small = Small(sizes)
    return (
        Group(dict, {"matrix_peak": Row(_matrix_product, (sizes.matrix,))}),
        Group(
            partial(_made, lambda key: pi05.for_inference(pi05.init(key))),
            {f"pi05_sample_{n}": Row(partial(_sample, pi05), (n,)) for n in (1, 8)},
        ),
        Group(dict, {"pi05_train": Row(partial(_train, pi05), sizes.train_batches)}),
        Group(
            partial(_made, lambda key: world_benchmark.awake(bagel.for_inference(bagel.init(key)))),
            {f"bagel_view_{n}": Row(partial(_view, bagel), (n,)) for n in (1, 8)}
            | {"bagel_reward_1": Row(partial(_reward, bagel))},
        ),
        Group(
            dict,
            {
                "small_sft": Row(small.sft, (sizes.sft_batch,)),
                "small_world_model": Row(small.world_model, (sizes.dynamics_batch,)),
            },
        ),
        Group(
            small.params,
            {f"small_imagine_{n}": Row(small.imagine, (n,)) for n in sizes.branches}
            | {"small_update": Row(small.update, (sizes.minibatch,))},
        ),
    )


def row_names(sizes: Sizes) -> list[str]:
    return [name for group in groups(sizes) for name in group.rows]


def _matrix_product(_: Params, size: int) -> Work:
    def factors():
        keys = jax.random.split(jax.random.key(0))
        # Random, since constants draw less power and let the clock rise.
        return tuple(jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)

    return Work(jnp.matmul, factors)


def _sample(policy: FlowPolicy, params: Params, batch: int) -> Work:
    """A chunk, with parameters prepared as the server does."""
    return Work(
        policy.act,
        lambda: (params, policy_benchmark.inputs(policy.config, batch), jax.random.key(1)),
    )


def _train(policy: FlowPolicy, _: Params, batch: int) -> Work:
    def data():
        actions = jnp.zeros((batch, policy.config.chunk, policy.config.action_dim))
        return policy_benchmark.inputs(policy.config, batch), actions

    def loss(actor, frozen, batch, key):
        return policy.loss(actor, *batch, key)

    return _training(loss, lambda key: policy.init(key)["actor"], {}, data)


def _training(
    loss_fn: Callable,
    init: Callable,
    frozen: Any,
    data: Callable[[], Any],
    matrix_learning_rate: float = 0.0,
) -> Work:
    """A step of `training.loop.fit`."""
    training = Training(
        steps=1000,
        learning_rate=1e-5,
        warmup_steps=10,
        weight_decay=1e-4,
        grad_clip=1.0,
        ema_decay=0.99,
        log_every=1,
        checkpoint_every=1,
        matrix_learning_rate=matrix_learning_rate,
    )
    tx = make_optimizer(training)

    def arguments():
        state = _made(lambda key: initial_state(init(key), tx))
        return state, frozen, data(), jax.random.key(1)

    step = skip_nonfinite(train_step(loss_fn, tx, training.ema_decay))
    return Work(step, arguments, carries=True)


def _view(world: SteppedWorld, params: Params, batch: int) -> Work:
    """The first view a chunk later, guided, from both views' latents and an action text."""
    config, camera = world.config, world.cameras[0]

    def view(params, observation, frames, actions, key):
        tokens = world.view(params, observation, frames, {}, actions, key, camera)
        return world.picture(params, tokens, camera)

    def arguments():
        observation, actions = world_benchmark.inputs(world, batch)
        key, size = jax.random.key(2), (batch, world.image_size, world.image_size, 3)
        pixels = jax.random.uniform(key, size, minval=-1.0)
        tokens = jax.random.normal(key, (batch, config.latent_side**2, config.token_size))
        frames = dict.fromkeys(world.cameras, Frame(pixels, tokens, None))
        return params, observation, frames, actions, key

    return Work(view, arguments)


def _reward(world: SteppedWorld, params: Params, batch: int) -> Work:
    """P(done), from the first view's picture."""

    def reward(params, observation):
        features = world.first_view_features(params, observation)
        frames = {world.cameras[0]: Frame(None, None, features)}
        return world.success_probability(params, WorldState(observation, frames))

    return Work(reward, lambda: (params, world_benchmark.inputs(world, batch)[0]))


class Small:
    """The rows of the size that trains from scratch on one GPU."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.world = world_benchmark.build(sizes.world, ComposedWorld)
        actions = self.world.action_dim
        stats = NormStats(*(np.full(actions, x, np.float32) for x in (0, 1, -1, 1)))
        limits = [(-1.0, 1.0)] * actions
        self.policy = FlowPolicy(sizes.policy, stats, stats, self.world.cameras, limits)
        self.mbpo = MBPO(self.policy, sizes.settings, self.world.chunk)

    def params(self) -> Params:
        def init(key):
            world = self.world.for_inference(self.world.init(key))
            return {"policy": self.policy.init(key), "world": world}

        return _made(init)

    def observed(self, batch: int) -> tuple[Observation, jax.Array]:
        """Observations and action chunks."""

        def prompt(length):
            return Prompt(np.full((batch, length), 5, np.int32), np.ones((batch, length), bool))

        observation, actions = world_benchmark.inputs(self.world, batch)
        observation = observation.replace(
            prompt=prompt(self.sizes.policy.max_prompt_tokens),
            world_prompt=prompt(self.sizes.world_prompt),
        )
        return observation, actions

    def demonstrations(self, batch: int) -> Demonstration:
        return Demonstration(*self.observed(batch), np.ones(batch, np.float32))

    def sft(self, _: Params, batch: int) -> Work:
        def loss(actor, frozen, batch, key):
            return self.policy.loss(actor, batch.observation, batch.actions, key, batch.quality)

        return _training(
            loss,
            lambda key: self.policy.init(key)["actor"],
            {},
            lambda: self.demonstrations(batch),
        )

    def world_model(self, _: Params, batch: int) -> Work:
        """Dynamics and reward, as stage `world_model` weighs them."""
        world, frozen = self.world, _made(self.world.init)
        frozen = {name: x for name, x in frozen.items() if name in world.frozen}

        def init(key):
            return {name: x for name, x in world.init(key).items() if name not in world.frozen}

        def data():
            observation, actions = self.observed(batch)
            seen = observation.images, observation.proprio
            labels = np.zeros(self.sizes.reward_batch, np.float32)
            example = RewardExample(self.observed(self.sizes.reward_batch)[0], labels)
            return Transition(observation, actions, *seen), example

        def loss(trained, frozen, batch, key):
            params = {**trained, **frozen}
            dynamics, _ = world.dynamics_loss(params, batch[0], key)
            reward, metrics = world.reward_loss(params, batch[1])
            return dynamics + 0.01 * reward, metrics

        return _training(loss, init, frozen, data, self.sizes.matrix_learning_rate)

    def _imagine(self, params, world_params, start, keys):
        settings = self.sizes.settings
        return imagine(
            self.policy,
            self.world,
            params,
            world_params,
            start,
            keys,
            chunks=settings.branch_chunks,
            reward_threshold=settings.reward_threshold,
        )

    def imagine(self, params: Params, batch: int) -> Work:
        """All branches at once."""

        def arguments():
            keys = jax.random.split(jax.random.key(3), batch)
            return params["policy"], params["world"], self.observed(batch)[0], keys

        chunks = batch * self.sizes.settings.branch_chunks
        return Work(self._imagine, arguments, chunks=chunks)

    def update(self, params: Params, batch: int) -> Work:
        """A step of policy optimisation on a minibatch of imagined chunks, with the anchor."""

        def minibatch(start, keys):
            branch = self._imagine(params["policy"], params["world"], start, keys)
            return flattened(self.mbpo.with_advantages(branch), normalize=False)

        def arguments():
            branches = batch // self.sizes.settings.branch_chunks
            keys = jax.random.split(jax.random.key(3), branches)
            shapes = jax.eval_shape(minibatch, self.observed(branches)[0], keys)
            chunks = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
            state = self.mbpo.init(jax.tree.map(jnp.copy, params["policy"]))
            return state, chunks, self.demonstrations(self.sizes.anchors), jax.random.key(4)

        return Work(skip_nonfinite(self.mbpo.update), arguments, carries=True)


def _made(init: Callable[[jax.Array], Any]) -> Any:
    """Parameters made by one program, with the generator that takes least memory on the way."""
    return jax.jit(init)(jax.random.key(0, impl="rbg"))


class Record:
    """`gpu.json` in a folder: a list of runs, each with its machine and rows, written after every
    row. Earlier runs stay.

    Raises:
        ValueError: the file that is there is damaged.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]):
        self.path = Path(directory) / "gpu.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.earlier = []
        if self.path.exists():
            try:
                self.earlier = json.loads(self.path.read_text())["runs"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} is damaged ({error}): move it away, or choose another --out"
                ) from error
        self.rows: list[dict] = []
        self._about = dict(about)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        runs = [*self.earlier, self._about | {"rows": self.rows}]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
        temporary.replace(self.path)


class Bench:
    """Times rows within a number of minutes; knows the measured peak of matrix products once the
    first row has run.

    Args:
        profile: name of the row that is also traced, into `directory/trace`.
        compile_seconds: expected of a compilation.
    """

    def __init__(self, directory: Path, minutes: float, compile_seconds: float, profile: str = ""):
        self.directory, self.profile = Path(directory), profile
        self.minutes, self.compile_seconds = minutes, compile_seconds
        self.deadline = time.monotonic() + 60 * minutes
        self.peak: float | None = None

    def params(self, group: Group) -> Params:
        """Raises Skipped where they do not fit, or there is no time to use them."""
        shapes = jax.tree.leaves(jax.eval_shape(group.params))
        needed = sum(x.size * x.dtype.itemsize for x in shapes)
        limit = _memory("bytes_limit")
        if limit and needed > limit:
            raise Skipped(
                f"its parameters take {needed / GIB:.1f} GiB, and JAX has {limit / GIB:.1f}"
            )
        self._check_time(self.compile_seconds)
        return jax.block_until_ready(group.params())

    def row(self, name: str, row: Row, params: Params) -> dict:
        """Numbers of the first batch that fits.

        Raises:
            Skipped: none fits, or there is no time.
        """
        problem = ""
        for batch in row.batches:
            try:
                return self._measured(name, row.work(params, batch), batch)
            except TooLarge as error:
                problem = str(error)
            gc.collect()  # what the attempt has left on the device
        raise Skipped(problem)

    def _measured(self, name: str, work: Work, batch: int) -> dict:
        jitted = jax.jit(work.function, donate_argnums=(0,) if work.carries else ())
        traced = jitted.trace(*jax.eval_shape(work.arguments))
        flops = program_flops(traced.jaxpr.jaxpr)
        expected = flops / (USUAL_SHARE_OF_PEAK * self.peak) if self.peak else 0.0
        self._check_time(self.compile_seconds + (1 + FEWEST_RUNS) * expected)
        before = _memory("peak_bytes_in_use")
        try:
            started = time.perf_counter()
            compiled = traced.lower().compile()
            compile_seconds = time.perf_counter() - started
            needed = _checked_need(compiled, batch)
            seconds = self._seconds(name, work, compiled)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise TooLarge(f"out of memory at batch {batch}") from None
        after = _memory("peak_bytes_in_use")
        middle, best = float(np.median(seconds)), min(seconds)
        if name == "matrix_peak":
            self.peak = flops / best
        rate = {"chunks_per_second": work.chunks / middle} if work.chunks else {}
        return {
            "batch": batch,
            "milliseconds": 1e3 * middle,
            "fastest_milliseconds": 1e3 * best,
            "runs": len(seconds),
            "compile_seconds": compile_seconds,
            "flops": flops,
            "flops_per_second": flops / middle,
            "share_of_peak": flops / middle / self.peak if self.peak else None,
            "program_bytes": needed,
            # JAX keeps one high-water mark of the process: it is this row's where it has risen.
            "peak_bytes": after if after != before else None,
        } | rate

    def _seconds(self, name: str, work: Work, compiled: Callable) -> list[float]:
        arguments = work.arguments()

        def run() -> float:
            nonlocal arguments
            started = time.perf_counter()
            results = jax.block_until_ready(compiled(*arguments))
            elapsed = time.perf_counter() - started
            if work.carries:
                arguments = (results[0], *arguments[1:])
            return elapsed

        first = run()
        self._check_time(FEWEST_RUNS * first)
        seconds: list[float] = []
        while len(seconds) < FEWEST_RUNS or (
            len(seconds) < MOST_RUNS and sum(seconds) < SECONDS_OF_RUNS
        ):
            seconds.append(run())
        if name == self.profile:
            with jax.profiler.trace(self.directory / "trace"):
                run()
            print(top_operations(self.directory / "trace"), flush=True)
        return seconds

    def _check_time(self, seconds: float) -> None:
        left = self.deadline - time.monotonic()
        if seconds > left:
            raise Skipped(
                f"it would take about {seconds:.0f} s, and of --minutes={self.minutes:g} "
                f"{max(left, 0):.0f} s are left"
            )


def _checked_need(compiled: Any, batch: int) -> int:
    """Bytes that a program needs. Raises TooLarge where that is more than JAX has."""
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    needed = arguments + memory.output_size_in_bytes + memory.temp_size_in_bytes
    needed -= memory.alias_size_in_bytes
    limit = _memory("bytes_limit")
    if limit and needed > limit:
        raise TooLarge(
            f"{needed / GIB:.1f} GiB are needed at batch {batch}, and JAX has {limit / GIB:.1f}"
        )
    return needed


def _memory(statistic: str) -> int | None:
    """Of the first device; None on a CPU, which keeps no account."""
    return (jax.devices()[0].memory_stats() or {}).get(statistic)


def run(
    size: str,
    directory: Path,
    minutes: float = 8.0,
    only: Collection[str] = (),
    profile: str = "",
) -> int:
    """Times all rows (or `only` some, and the matrix peak) and prints and records each at once;
    returns how many failed.

    Raises:
        ValueError: an unknown row, full size on a CPU, or a damaged record of earlier runs.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    if size == "full" and jax.default_backend() == "cpu":
        raise ValueError("JAX sees no accelerator here: --size=tiny, or install jax[cuda13]")
    chosen = sizes(size)
    names = row_names(chosen)
    for name in [*only, *([profile] if profile else [])]:
        if name not in names:
            raise ValueError(f"there is no row {name!r}; rows: {', '.join(names)}")
    device = jax.devices()[0]
    about = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "size": size,
    }
    record = Record(directory, about)
    for earlier in record.earlier:
        measured = [row["row"] for row in earlier["rows"] if "milliseconds" in row]
        print(f"{record.path} has a run of {earlier['started']}: {', '.join(measured)}")
    print(f"{device.device_kind}, JAX {jax.__version__}, sizes {size}\n{_HEADER}", flush=True)
    bench = Bench(directory, minutes, chosen.compile_seconds, profile)

    def add(name: str, outcome: dict) -> None:
        record.add({"row": name} | outcome)
        print(_line(record.rows[-1]), flush=True)

    for group in groups(chosen):
        rows = {n: r for n, r in group.rows.items() if not only or n in (*only, "matrix_peak")}
        if not rows:
            continue
        params, problem = _attempt(bench.params, group)
        for name, row in rows.items():
            found, row_problem = (
                (None, problem) if problem else _attempt(bench.row, name, row, params)
            )
            add(name, found or row_problem)
        del params
        gc.collect()
    skipped = [row["row"] for row in record.rows if "skipped" in row]
    if skipped:
        print(f"skipped; again with --rows={','.join(skipped)}")
    print(f"written to {record.path}")
    return sum("failed" in row for row in record.rows)


def _attempt(function: Callable, *arguments: Any) -> tuple[Any, dict]:
    """The result, or else why there is none; one row's failure must not end the others'."""
    try:
        return function(*arguments), {}
    except Skipped as reason:
        return None, {"skipped": str(reason)}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return None, {"failed": f"{type(error).__name__}: {lines[0][:300]}"}


_HEADER = (
    f"{'row':22}{'batch':>6}{'ms':>10}{'compile s':>11}{'TFLOP/s':>9}{'of peak':>9}"
    f"{'program GiB':>13}{'peak GiB':>10}"
)


def _line(row: dict) -> str:
    if "milliseconds" not in row:
        return f"{row['row']:22}" + "; ".join(f"{k}: {v}" for k, v in row.items() if k != "row")
    share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
    line = f"{row['row']:22}{row['batch']:6}{row['milliseconds']:10.2f}"
    line += f"{row['compile_seconds']:11.1f}{row['flops_per_second'] / 1e12:9.2f}{share:>9}"
    line += f"{row['program_bytes'] / GIB:13.2f}{peak:>10}"
    if "chunks_per_second" in row:
        line += f"  {row['chunks_per_second']:.0f} chunks/s"
    return line


def top_operations(directory: Path, count: int = 10) -> str:
    """The operations that took most of a trace's time on the device, one a line."""
    newest = max(Path(directory).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    named = [e for e in events if e.get("ph") == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}
    on_device = any("/device:" in name for name in processes.values())
    spent: Counter[str] = Counter()
    for event in events:
        process = processes.get(event.get("pid"), "")
        thread = threads.get((event.get("pid"), event.get("tid")), "")
        kernels = "/device:" in process and "Stream" in thread
        if event.get("ph") == "X" and (kernels if on_device else "XLA" in thread):
            spent[event["name"]] += event["dur"]
    total = max(sum(spent.values()), 1e-9)
    lines = [f"{us / 1e3:10.2f} ms {us / total:6.1%}  {n}" for n, us in spent.most_common(count)]
    return "\n".join([f"trace in {newest.parent}", *lines])
