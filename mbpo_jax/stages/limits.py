"""What the entries of a config may be: checked before anything is run or written."""

import math
from collections.abc import Iterator

from mbpo_jax import seeds
from mbpo_jax.policy.config import Pi0Config
from mbpo_jax.stages.build import Config, build_world_model, dataclass_from, robot
from mbpo_jax.stages.entries import (
    BELOW_ONE,
    COUNT_OR_NONE,
    POSITIVE,
    SHARE,
    Number,
    check_entries,
    refuse,
)

NUMBERS = {
    "robot.*": Number(-math.inf),  # `Embodiment` knows more
    "seed": Number(0, seeds.LARGEST_SEED),
    "tasks": Number(0, 10_000),
    "profile_steps": COUNT_OR_NONE,
    "image_size": Number(1, 4096),
    "workers": Number(1, 1024),
    # Eight attempts at each must stay before the resets of the rollouts, and these before others'.
    "demonstrations.episodes_per_task": Number(1, 6_250),
    "rollouts.episodes_per_task": Number(1, 850_000),
    "demonstrations.action_noise": Number(),
    "demonstrations.aim_error": Number(),
    "demonstrations.aim_offset": Number(-math.inf),
    "evaluation.episodes_per_task": COUNT_OR_NONE,
    "evaluation.resets_per_task": COUNT_OR_NONE,
    "value.steps": COUNT_OR_NONE,
    "world_model.vae_training.steps": COUNT_OR_NONE,
    "*.warmup_steps": COUNT_OR_NONE,
    "rl.critic_warmup": COUNT_OR_NONE,
    "*.learning_rate": Number(),
    "*.matrix_learning_rate": Number(),
    "rl.*_lr": Number(),
    "*.weight_decay": Number(),
    "*.grad_clip": POSITIVE,
    "*.ema_decay": BELOW_ONE,
    "world_model.holdout_fraction": Number(high=1, above=True, below=True),
    "world_model.reward_yes_fraction": SHARE,
    "world_model.*_weight": Number(),
    "world_model.model.augment_*": Number(),
    "world_model.model.proprio_dim": COUNT_OR_NONE,
    "world_model.model.vae.*_factor": Number(-math.inf),
    "policy.lora.rank": COUNT_OR_NONE,
    "policy.condition_dropout": SHARE,
    "rl.discount": BELOW_ONE,
    "rl.gae_lambda": SHARE,
    "rl.reward_threshold": BELOW_ONE,
    "rl.clip_ratio": POSITIVE,
    "rl.value_clip": POSITIVE,
    "rl.huber_delta": POSITIVE,
    "rl.dual_clip": Number(),
    "rl.anchor_weight": Number(),
    "rl.flow.noise_std": POSITIVE,
    "*noise_std": Number(),
}

DTYPES = ("float32", "bfloat16", "float16")
CHOICES = {
    "policy.normalization": ("quantile", "zscore"),
    "policy.dtype": DTYPES,
    "world_model.model.*.dtype": DTYPES,
    "rl.method": ("ppo", "ranked"),
    "rl.world": ("world_model", "simulator"),
    "rl.start_states_from": ("dataset", "episode_start"),
    "rl.discount_per": ("paper", "reference"),
    "parallel.world_model": ("replicated", "sharded", "offloaded"),
    "parallel.rollout": ("shard_map", "pmap"),
    "worker_backend": ("local", "ray"),
    "evaluation.checkpoint": ("last", "best"),
}


def check_config(config: Config) -> None:
    """Entries that the config lacks are not missed.

    Raises:
        ValueError: entries that no run can use; names each with its value and what it may be.
    """
    check_entries(config, NUMBERS, CHOICES)
    refuse(dict.fromkeys(_contradictions(config)))


def _contradictions(config: Config) -> Iterator[str]:
    """Entries that do not fit each other."""
    for part in (_robot, _models, _chunks, _simulator, _branches):
        try:
            yield from part(config)
        except ValueError as error:
            yield str(error)


def _robot(config: Config) -> Iterator[str]:
    known = robot(config).cameras
    cameras = config.cameras
    unknown = [camera for camera in cameras if camera not in known]
    if unknown or not cameras or len(set(cameras)) < len(cameras):
        yield f"cameras is {cameras!r}: some of the robot's, each once: {', '.join(known)}"


def _models(config: Config) -> Iterator[str]:
    dataclass_from(Pi0Config, {**config.policy, "flow": config.rl.flow})
    size = config.policy.vision.image_size
    if config.image_size != size and not config.policy.resize_images:
        yield (
            f"image_size is {config.image_size} and policy.vision.image_size is {size}: the same, "
            "or policy.resize_images=True"
        )
    if not config.pretrained.world_tokenizer:  # which may be on another machine
        build_world_model(config)


def _chunks(config: Config) -> Iterator[str]:
    if config.policy.chunk != config.chunk:
        yield f"chunk is {config.chunk} and policy.chunk is {config.policy.chunk}: the same"
    for section in ("demonstrations", "rollouts"):
        every = config[section].get("render_every", 1)
        if config.chunk % every:
            yield f"{section}.render_every is {every}: it divides chunk, {config.chunk}"


def _simulator(config: Config) -> Iterator[str]:
    if "max_steps" in config and config.max_steps < config.chunk:
        yield f"max_steps is {config.max_steps}: at least a chunk, {config.chunk}"
    if "max_steps" in config and (not config.tasks or len(set(config.tasks)) < len(config.tasks)):
        yield f"tasks is {config.tasks!r}: one or more numbers, each once"
    evaluation = config.get("evaluation", {})
    if evaluation and not evaluation.episodes_per_task + evaluation.resets_per_task:
        yield "evaluation.episodes_per_task and evaluation.resets_per_task are 0: one of them above"
    offset = config.get("demonstrations", {}).get("aim_offset", (0.0, 0.0))
    if len(offset) != 2:
        yield f"demonstrations.aim_offset is {offset!r}: two numbers, x and y"


def _branches(config: Config) -> Iterator[str]:
    rl = config.rl
    if rl.method == "ranked" and not rl.ranked.kept < rl.group_size:
        yield (
            f"rl.ranked.kept is {rl.ranked.kept}: fewer than the {rl.group_size} chunks of a group "
            "(rl.group_size)"
        )
    if rl.method == "ranked" and config.get("evaluation", {}).get("checkpoint") == "best":
        yield (
            "evaluation.checkpoint is 'best', the state of the highest imagined success: only "
            "rl.method='ppo' keeps that"
        )
    if 0 < rl.dual_clip <= 1:
        yield f"rl.dual_clip is {rl.dual_clip}: 0, or above 1"
    for size in ("imagination_batch", "group_size"):
        if rl.start_states % rl[size]:
            yield f"rl.start_states is {rl.start_states}: a multiple of rl.{size}, {rl[size]}"
    minibatch = min(rl.minibatch_size, rl.start_states * rl.branch_chunks)
    if minibatch % rl.gradient_accumulation:
        yield (
            f"rl.minibatch_size is {minibatch}: a multiple of rl.gradient_accumulation, "
            f"{rl.gradient_accumulation}"
        )
