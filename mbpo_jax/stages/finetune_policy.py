"""Stage `sft`: flow matching on the demonstrations, or on rollouts too: on their successes, or by a
policy conditioned on whether an episode succeeded (π*0.6, arXiv 2511.14759) on all."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.data.normalization import compute_norm_stats, widen, write_norm_stats
from mbpo_jax.data.pipelines import Source, batches, demonstrations
from mbpo_jax.nn.normalization import BOUND, NormStats
from mbpo_jax.policy.checkpoint import load_openpi
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.seeds import stream
from mbpo_jax.stages.build import (
    Config,
    build_policy,
    check_prompts,
    checkpoint_origin,
    dataclass_from,
    observation_builder,
    robot,
)
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.training.checkpoints import save_params
from mbpo_jax.training.loop import LossFn, Training, fit
from mbpo_jax.training.run import Run
from mbpo_jax.training.sharding import make_mesh, parameter_sharding
from mbpo_jax.types import Params


def finetune_policy(workspace: Workspace, directory: Path) -> dict:
    """Trains the policy on the experts' labels; writes `policy/` (the average of the parameters)
    and `norm_stats.json`."""
    config = workspace.config
    workspace.require("demonstrations")
    episodes = read_episodes(workspace.directory("demonstrations") / "dataset")
    if config.sft.rollouts:
        rollouts = read_episodes(config.sft.rollouts)
        if not config.policy.advantage_conditioned:  # which alone can tell failures apart
            rollouts = [episode for episode in rollouts if episode.success]
        if not rollouts:
            raise StageError(
                f"no rollout in {config.sft.rollouts} succeeded, and only a policy with "
                "--config.policy.advantage_conditioned may learn from failures"
            )
        episodes += rollouts
    check_prompts(workspace, directory.name, episodes)
    source = demonstrations(episodes, observation_builder(config))
    actions = np.concatenate([e.target_actions[e.num_actions > 0] for e in episodes])
    proprio = np.concatenate([e.proprio for e in episodes])
    stats, widened = _statistics(config, actions, proprio)
    if jax.process_index() == 0:
        write_norm_stats(directory / "norm_stats.json", stats)
        for line in widened:
            print(f"[sft] normalisation widened to keep values within ±{BOUND:g}: {line}")
    policy = build_policy(config, stats)
    mesh, rules = make_mesh(config.parallel.fsdp), config.parallel.rules
    key = jax.random.key(stream(config.seed, "policy_init"))
    shardings = parameter_sharding(jax.eval_shape(policy.init, key), mesh, rules)
    params = jax.jit(policy.init, out_shardings=shardings)(key)
    if config.pretrained.policy:
        params["actor"] = load_openpi(config.pretrained.policy, policy.config, shardings["actor"])

    origin = checkpoint_origin(
        config, ["policy", "sft"], {name: vars(x) for name, x in stats.items()}
    )
    actor = imitate(
        policy,
        params["actor"],
        source,
        config.sft,
        stream(config.seed, "sft_batches"),
        Run.of(config, "policy fine-tuning", directory, stream(config.seed, "sft"), origin),
        policy.trainable(params)["actor"],
    )
    save_params(directory / "policy", {"actor": actor, "critic": params["critic"]})
    return {
        "frames": len(source),
        "parameters": sum(x.size for x in jax.tree.leaves(actor)),
        "steps": config.sft.steps,
        "normalization_widened": widened,
    }


def _statistics(
    config: Config, actions: np.ndarray, proprio: np.ndarray
) -> tuple[dict[str, NormStats], list[str]]:
    """openpi's two entries, and a line for each dimension that was widened (`widen`)."""
    mode, embodiment = config.policy.normalization, robot(config)
    stats, lines = {}, []
    for name, x, names in (
        ("actions", actions, embodiment.actions),
        ("state", proprio, embodiment.states),
    ):
        if x.shape[-1] != len(names):
            raise StageError(
                f"the episodes have {x.shape[-1]} {name} dimensions, the robot "
                f"{embodiment.name!r} has {len(names)}: import them again, or change the config's "
                "robot"
            )
        stats[name], widened = widen(compute_norm_stats(x), x, mode, names)
        lines += [f"{name}: {line}" for line in widened]
    return stats, lines


def imitate(
    policy: FlowPolicy,
    actor: Params,
    source: Source | Sequence[Source],
    section: Config,
    batch_seed: int,
    run: Run,
    trainable: Params | None = None,
) -> Params:
    """The actor after flow matching on the `Demonstration`s of `source`; several have equal shares.

    Args:
        section: of the config, with the fields of `Training` and "batch_size".
        trainable: which of the actor's parameters move, see `fit`.

    Raises:
        FloatingPointError, Interrupted, OSError: as `fit`.
    """
    return fit(
        flow_matching_loss(policy),
        actor,
        {},
        lambda first: batches(source, section.batch_size, batch_seed, start_step=first),
        dataclass_from(Training, section),
        run,
        trainable,
    )


def flow_matching_loss(policy: FlowPolicy) -> LossFn:
    """The policy's loss on `Demonstration`s."""

    def loss_fn(actor, frozen, batch, key):
        return policy.loss(actor, batch.observation, batch.actions, key, batch.quality)

    return loss_fn
