"""The programs of a run, each with what it is lowered for: shapes and shardings, and no arrays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mbpo_jax.mbpo import MBPO, Settings
from mbpo_jax.nn.normalization import NormStats
from mbpo_jax.stages.build import (
    Config,
    build_policy,
    build_world_model,
    dataclass_from,
    observation_builder,
)
from mbpo_jax.stages.finetune_policy import flow_matching_loss
from mbpo_jax.stages.imagination import placed_branch, programs
from mbpo_jax.stages.rank_chunks import ranking, starts_at_a_time
from mbpo_jax.stages.train_dynamics import joint_loss
from mbpo_jax.training.loop import Training, initial_state, jit_step, make_optimizer, train_step
from mbpo_jax.training.sharding import batch_sharding, frozen_weight_sharding, parameter_sharding
from mbpo_jax.types import Demonstration, RewardExample, Transition

OTHER_SUITES_BRANCHES = 512  # start states of the suites other than LIBERO-Long


@dataclass(frozen=True)
class Step:
    """A program of a stage.

    program, arguments: a jitted function and what it is lowered for. runs: how often the stage
    runs it. resident: bytes per device of arrays that live meanwhile without being its arguments.
    gradient: bytes per device of the gradient that devices along `data` exchange.
    """

    name: str
    stage: str
    runs: int
    program: Callable
    arguments: tuple
    resident: int = 0
    gradient: int = 0


class Steps:
    """Every step of the supervised stages and of policy optimisation, on a mesh."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh, self.rules = config, mesh, config.parallel.rules
        size = (config.image_size, config.image_size, 3)
        images = {camera: np.zeros(size, np.uint8) for camera in config.cameras}
        proprio = np.zeros(len(config.robot.states))
        instruction = "pick up the book and place it on the shelf"
        self.seen = observation_builder(config)(images, proprio, instruction)
        zeros = {"actions": config.action_dim, "state": len(config.robot.states)}
        stats = {name: NormStats(*(np.zeros(n, np.float32),) * 4) for name, n in zeros.items()}
        self.policy, self.world = build_policy(config, stats), build_world_model(config)
        self.policy_params, self.world_params = (
            jax.eval_shape(model.init, jax.random.key(0)) for model in (self.policy, self.world)
        )
        self.trainable = self.policy.trainable(self.policy_params)["actor"]
        self.weights = jax.eval_shape(self.world.for_inference, self.world_params)
        placement = frozen_weight_sharding(
            self.weights, mesh, self.rules, config.parallel.world_model
        )
        self.at_rest, self.in_use = (
            jax.tree.map(_with_sharding, self.weights, where) for where in placement
        )
        self.actions = np.zeros((config.chunk, config.action_dim), np.float32)
        self.demonstration = Demonstration(self.seen, self.actions, np.float32(1))
        self.key = jax.eval_shape(lambda: jax.random.key(0))

    def __iter__(self) -> Iterator[Step]:
        yield self._flow_matching("SFT step", "sft", self.config.sft)
        if self.config.world_model.vae_training.steps:
            yield self._autoencoder()
        yield self._world_model()
        if self.config.rl.method == "ranked":
            yield from self._ranked()
            return
        own = self.config.rl.start_states
        for branches in sorted({min(own, OTHER_SUITES_BRANCHES), own}):
            yield from self._optimization(branches, in_run=branches == own)

    def _flow_matching(self, name: str, stage: str, section: Config) -> Step:
        return self._training(
            name,
            stage,
            flow_matching_loss(self.policy),
            section,
            self.policy_params["actor"],
            {},
            self._batch(self.demonstration, section.batch_size),
            self.trainable,
        )

    def _autoencoder(self) -> Step:
        section = self.config.world_model.vae_training
        images = self._batch(next(iter(self.seen.images.values())), section.batch_size)

        def loss_fn(vae, frozen, images, key):
            return self.world.autoencoder.loss(vae, images, key)

        start = self.world_params["vae"]
        return self._training("autoencoder step", "vae", loss_fn, section, start, {}, images)

    def _world_model(self) -> Step:
        section, world = self.config.world_model, self.world
        moments = None
        if world.config.vae:
            first = self.seen.images[world.cameras[0]][None]
            encoded = jax.eval_shape(world.autoencoder.moments, self.world_params, first)
            of_view = {camera: np.zeros(encoded.shape[1:], np.float32) for camera in world.cameras}
            moments = of_view, of_view
        transition = Transition(self.seen, self.actions, self.seen.images, self.seen.proprio)
        batch = (
            self._batch((transition, moments), section.dynamics_batch_size),
            self._batch(RewardExample(self.seen, np.float32(0)), section.reward_batch_size),
        )
        params = self.world_params
        return self._training(
            "world-model step",
            "world_model",
            joint_loss(self.config, world),
            section.training,
            {k: v for k, v in params.items() if k not in world.frozen},
            {k: v for k, v in params.items() if k in world.frozen},
            batch,
        )

    def _training(
        self, name, stage, loss_fn, section, params, frozen, batch, trainable=None
    ) -> Step:
        tx = make_optimizer(dataclass_from(Training, section), trainable)
        state = self._placed(jax.eval_shape(partial(initial_state, tx=tx), params))
        step = train_step(loss_fn, tx, section.ema_decay, section.gradient_accumulation)
        program = jit_step(step, jax.tree.map(lambda x: x.sharding, state))
        arguments = (state, self._placed(frozen), batch, self.key)
        gradient = device_bytes(state.params)
        return Step(name, stage, section.steps, program, arguments, gradient=gradient)

    def _ranked(self) -> Iterator[Step]:
        ranked, count = self.config.rl.ranked, starts_at_a_time(self.config, self.mesh)
        acting = self._placed(jax.eval_shape(self.policy.for_inference, self.policy_params))
        yield Step(
            f"ranking of {count} groups",
            "improve",
            -(-ranked.start_states // count),
            ranking(self.config, self.policy, self.world, self.mesh),
            ((acting, self.in_use), self._batch(self.seen, count), self._batch(self.key, count)),
            device_bytes(self._placed(self.policy_params)),
        )
        fit = self._flow_matching("step on the best chunks", "improve", ranked)
        # The world model is still where it was loaded.
        yield replace(fit, resident=device_bytes(self._placed(self.weights)))

    def _optimization(self, branches: int, in_run: bool) -> Iterator[Step]:
        config = self.config.copy_and_resolve_references()
        config.unlock()
        config.rl.start_states = branches
        rl, mesh = config.rl, self.mesh
        mbpo = MBPO(self.policy, dataclass_from(Settings, rl), config.chunk, self.trainable)
        state = self._placed(jax.eval_shape(mbpo.init, self.policy_params))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        refill, revalue, _, update = programs(config, mbpo, self.world, mesh, shardings)
        one = jax.tree.map(lambda x: x[None], self.seen)
        precomputed = jax.eval_shape(self.world.precompute, self.weights, one, self.key)
        precomputed = jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), precomputed)
        start = self._batch((self.seen, precomputed), branches)
        refill_step = Step(
            f"imagination of {branches} branches",
            "improve",
            -(-rl.updates // rl.updates_per_refill) * in_run,
            jax.jit(refill),
            (state.params, self.in_use, start, self.key),
            device_bytes((state.actor_opt, state.critic_opt)),
        )
        yield refill_step
        if not in_run:
            return
        branch = placed_branch(jax.eval_shape(refill, *refill_step.arguments), mesh)
        idle = 0 if config.parallel.world_model == "offloaded" else device_bytes(self.at_rest)
        refills = refill_step.runs
        yield Step(
            "value recomputation",
            "improve",
            max(rl.updates // rl.value_recompute_every - refills, 0),
            revalue,
            (state.params, branch),
            idle + device_bytes((state.actor_opt, state.critic_opt)),
        )
        gradient = device_bytes(state.params)
        anchors = self._batch(self.demonstration, rl.anchor_batch) if rl.anchor_weight else None
        arguments = (state, branch, self.key, anchors)
        yield Step("PPO update", "improve", rl.updates, update, arguments, idle, gradient)

    def _placed(self, tree):
        return jax.tree.map(_with_sharding, tree, parameter_sharding(tree, self.mesh, self.rules))

    def _batch(self, row, size: int):
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *np.shape(x)), x.dtype, sharding=sharding), row
        )


def _with_sharding(x, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of abstract arrays with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
