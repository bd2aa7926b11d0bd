"""Ways to act: what the policy samples, the same with noise, or the best of several chunks."""

from collections.abc import Callable
from pathlib import Path

import jax

from mbpo_jax.mbpo import chunk_discount
from mbpo_jax.policy.config import FlowConfig
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.seeds import stream
from mbpo_jax.selection import best_of
from mbpo_jax.stages.build import Config, abstract_params, load_policy, load_world_model
from mbpo_jax.training.checkpoints import load_params
from mbpo_jax.types import Array, Observation, Params

Act = Callable[[Params, Observation, Array], Array]  # (params, observation [1], key) -> [1, k, A]


def exploring(policy: FlowPolicy, noise_std: float) -> Act:
    """`policy.act`, or with a `noise_std` its chunks with smooth noise (`policy.flow`)."""
    if not noise_std:
        return policy.act
    steps = policy.config.eval_steps
    explorer = policy.with_flow(FlowConfig(method="smooth", steps=steps, noise_std=noise_std))

    def act(params: Params, observation: Observation, key: Array) -> Array:
        prefix = explorer.encode(params, observation)
        return explorer.sample(params, prefix, key).actions

    return act


def load_selection(
    config: Config, root: Path, actor: Path, choice: str = "best"
) -> tuple[Act, Params]:
    """Best of `evaluation.best_of` chunks (`selection`) of the policy whose parameters are at
    `actor`, by the world model and the value of the run in `root`: the acting function and its
    parameters."""
    policy, params = load_policy(config, root / "sft", actor)
    judge = load_params(root / "sft" / "policy", abstract_params(policy))
    critic = load_params(root / "value" / "critic", abstract_params(policy)["critic"])
    world, world_params = load_world_model(config, root)
    rl = config.rl
    act = best_of(
        policy,
        world,
        config.evaluation.best_of,
        *chunk_discount(rl.discount, config.chunk, rl.discount_per),
        choice=choice,
        chunks=config.evaluation.best_of_chunks,
    )
    return act, {
        "policy": params,
        "value": jax.jit(policy.for_inference)({**judge, "critic": critic}),
        "world": world.for_inference(world_params),
    }


def acting_program(act: Act, seed: int) -> Callable[[Params, Observation, Array], Array]:
    """Jitted `(params, observations, identities) -> actions [B, k, A]` of an acting function, such
    as `FlowPolicy.act`.

    A chunk's noise depends on the run's `seed` and on its row of `identities` int [B, 2], (episode,
    chunk), alone, so that an episode comes out the same however requests are batched.
    """
    base_key = jax.random.key(stream(seed, "acting"))

    @jax.jit
    def act_on_all(params, observations, identities):
        def one(observation, identity):
            key = jax.random.fold_in(jax.random.fold_in(base_key, identity[0]), identity[1])
            batch = jax.tree.map(lambda x: x[None], observation)
            return act(params, batch, key)[0]

        return jax.vmap(one)(observations, identities)

    return act_on_all
