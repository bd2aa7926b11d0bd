"""Objects from a config: tokenisers, observations, the policy and the world model."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from mbpo_jax.data.normalization import far_extremes, read_norm_stats
from mbpo_jax.data.pipelines import ObservationBuilder
from mbpo_jax.data.tokenizers import EmbeddedTokenizer, PaliGemmaTokenizer, QwenTokenizer
from mbpo_jax.embodiment import Embodiment
from mbpo_jax.episode import Episode
from mbpo_jax.nn.normalization import BOUND, NormStats
from mbpo_jax.policy.config import Pi0Config
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.stages.workspace import StageError, Workspace, config_entries
from mbpo_jax.training.checkpoints import load_params
from mbpo_jax.training.sharding import Rules, parameter_sharding
from mbpo_jax.types import Array, Params
from mbpo_jax.world_model.composed import ComposedWorld
from mbpo_jax.world_model.config import UMMConfig
from mbpo_jax.world_model.umm_world import UMMWorld

Config = ml_collections.ConfigDict


def dataclass_from(cls, section):
    """A (nested) dataclass with the values that a config section has for its fields; one that the
    section lacks, as that of an older run may, has its default."""
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name not in section:
            continue
        value, hint = section[field.name], hints[field.name]
        options = [x for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x)]
        nested = options and value is not None
        values[field.name] = dataclass_from(options[0], value) if nested else value
    return cls(**values)


def robot(config: Config) -> Embodiment:
    """The robot of a config. Raises ValueError if its entries contradict each other."""
    return dataclass_from(Embodiment, config.robot)


def policy_tokenizer(config: Config):
    path = config.pretrained.policy_tokenizer
    return PaliGemmaTokenizer(path) if path else EmbeddedTokenizer()


def world_tokenizer(config: Config):
    path = config.pretrained.world_tokenizer
    return QwenTokenizer(path) if path else EmbeddedTokenizer()


def observation_builder(config: Config) -> ObservationBuilder:
    """Turns camera frames, proprioception and an instruction into model observations."""
    return ObservationBuilder(
        cameras=tuple(config.cameras),
        policy_tokenizer=policy_tokenizer(config),
        prompt_length=config.policy.max_prompt_tokens,
        world_tokenizer=world_tokenizer(config),
        world_prompt_length=config.world_model.max_prompt_tokens,
    )


def check_prompts(workspace: Workspace, stage: str, episodes: Sequence[Episode]) -> None:
    """Before a stage has made anything: every instruction must fit both token budgets. The stage
    forgets its config, so that another budget may be tried.

    Raises:
        StageError: naming the episodes and the config's entries.
    """
    problems = observation_builder(workspace.config).prompt_problems
    lines = [f"  episode {i}: {x}" for i, e in enumerate(episodes) for x in problems(e.instruction)]
    if lines:
        workspace.abandon(stage)
        raise StageError("instructions are longer than the models read:\n" + "\n".join(lines))


def build_policy(config: Config, norm_stats: dict[str, NormStats]) -> FlowPolicy:
    """The policy of `config.policy` with the statistics of the data it is trained on; as a
    distribution over chunks it is what `config.rl.flow` says. Statistics by which some of that data
    lies beyond `BOUND` are told on the terminal."""
    section, embodiment = {**config.policy, "flow": config.rl.flow}, robot(config)
    for name, names in (("actions", embodiment.actions), ("state", embodiment.states)):
        if len(norm_stats[name].mean) != len(names):
            raise ValueError(
                f"the statistics of {name} have {len(norm_stats[name].mean)} dimensions, the robot "
                f"{embodiment.name!r} has {len(names)}: use statistics of this robot"
            )
        for line in far_extremes(norm_stats[name], config.policy.normalization, names):
            print(f"warning: {name} normalised beyond ±{BOUND:g}: {line}")
    return FlowPolicy(
        dataclass_from(Pi0Config, section),
        norm_stats["actions"],
        norm_stats["state"],
        tuple(config.cameras),
        embodiment.action_limits,
    )


def load_policy(config: Config, sft_directory: Path, params_directory: Path):
    """The policy that a stage left behind, ready to act: (FlowPolicy, params for inference)."""
    policy = build_policy(config, read_norm_stats(sft_directory / "norm_stats.json"))
    params = load_params(params_directory, abstract_params(policy))
    return policy, jax.jit(policy.for_inference)(params)


def build_world_model(config: Config) -> UMMWorld:
    """The world model of `config.world_model.model`."""
    model = dataclass_from(UMMConfig, config.world_model.model)
    kind = ComposedWorld if model.prediction == "composed" else UMMWorld
    return kind(
        model,
        cameras=tuple(config.cameras),
        image_size=config.image_size,
        action_dim=config.action_dim,
        chunk=config.chunk,
        tokenizer=world_tokenizer(config),
        action_limits=robot(config).action_limits,
    )


def load_world_model(config: Config, root: Path) -> tuple[UMMWorld, Params]:
    """The world model that was trained in the working directory `root`, with its parameters."""
    world = build_world_model(config)
    return world, load_params(root / "world_model" / "world_model", abstract_params(world))


def checkpoint_origin(
    config: Config, sections: Sequence[str], normalization: Mapping[str, Mapping[str, Array]]
) -> dict:
    """What the checkpoints of a training depend on (see `Checkpoints`): config entries of the given
    sections and the statistics that its model normalises with."""
    return {
        "config": config_entries(config, sections),
        "normalization": jax.tree.map(lambda x: np.asarray(x).tolist(), normalization),
    }


def abstract_params(model, mesh: Mesh | None = None, rules: Rules = ()) -> Params:
    """Shapes, dtypes and placement of a model's parameters: on one device of this process, or split
    over a mesh (`parameter_sharding`)."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = (
        parameter_sharding(shapes, mesh, rules) if mesh else jax.tree.map(lambda _: device, shapes)
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
