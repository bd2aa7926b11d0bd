"""The rows of the target `gpu`: which programs are timed, at which sizes, on which inputs."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import policy as policy_benchmark
from experiments.benchmarks import world_model as world_benchmark
from experiments.benchmarks.gpu_timing import GIB, Group, Row, Work, device_memory
from experiments.benchmarks.reference_stack import SteppedWorld
from experiments.benchmarks.training import TRAINING
from mbpo_jax.mbpo import MBPO, Settings, flattened, imagine
from mbpo_jax.policy.config import FlowConfig, Pi0Config, variants
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.training.loop import initial_state, make_optimizer, train_step
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
from mbpo_jax.world_model.frames import Frame

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


def sizes(name: str) -> Sizes:
    """`full`: what the commands run on GPUs. `tiny`: the same programs in seconds on a CPU."""
    flow = FlowConfig(method="smooth", noise_std=0.08, steps=10)
    if name == "full":
        # Every batch that does not fit costs a compilation.
        largest = 128 if (device_memory("bytes_limit") or 0) > 100 * GIB else 32
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
    training = dataclasses.replace(TRAINING, matrix_learning_rate=matrix_learning_rate)
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
        stats = policy_benchmark.neutral_stats(actions)
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
