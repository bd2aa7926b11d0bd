"""VLA-MBPO on LIBERO-Long (the suite `libero_10`).

Variants, chosen as `--config=configs/libero_long.py:NAME`:

    tiny    2 CPU cores, some minutes. One of everything, untrained: for tests of the machinery.
    micro   2 CPU cores, 24 GiB, three quarters of an hour. Task 5, everything from scratch, from
            demonstrations that all miss to the same side; with seeds 0 to 2 the policy solved
            269 of 600 resets before policy optimisation, 397 after it, and 304 after the same
            updates on chunks at random (docs/results.md).
    mini    2 CPU cores, 24 GiB, at most three hours. `micro` without that habit, on four tasks (0,
            1, 2, 5), with one policy and one world model for all of them. Never run as a whole:
            after its 4000 steps of fine-tuning 1 of 22 rollouts succeeded, so it needs more.
    small   one GPU, some hours. All ten tasks from scratch; never run as a whole.
    paper   8 x H100, some hours by the bounds of `experiments.plan`; never run. Public π0.5 and
            BAGEL checkpoints by path (`--config.pretrained.policy=DIR
            --config.pretrained.world_model=DIR` and the two tokenisers).

The default command is `python -m experiments.libero_long`, which runs `micro`. Names and defaults
of the `rl` section are the paper's (arXiv 2603.20607; the algorithm's are described in
`mbpo_jax.mbpo.Settings`); what a variant changes is below it.
"""

import dataclasses
from difflib import get_close_matches

import ml_collections

from configs.libero_panda import ROBOT
from mbpo_jax import mbpo
from mbpo_jax.embodiment import Embodiment
from mbpo_jax.policy import config as policy_config
from mbpo_jax.world_model import config as world_config

VARIANTS = ("tiny", "micro", "mini", "small", "paper")


def get_config(
    variant: str = "micro", suite: str = "libero_10", robot: Embodiment = ROBOT
) -> ml_collections.ConfigDict:
    """The locked config of a variant, for a suite of tasks and the robot that does them.

    Raises:
        ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        near = get_close_matches(variant, VARIANTS, n=1, cutoff=0.0)
        raise ValueError(
            f"there is no variant {variant!r}; did you mean {near[0]!r}? Variants: "
            + ", ".join(VARIANTS)
        )
    config = _paper(suite, robot)
    if variant in ("tiny", "micro", "mini"):
        _make_micro(config)
    if variant == "micro" and suite == "libero_10":
        _give_a_habit(config)
    if variant == "tiny":
        _make_tiny(config)
    if variant == "mini":
        _make_mini(config)
    if variant == "small":
        _make_small(config)
    config.policy.wrist_cameras = robot.wrist_cameras
    config.policy.chunk = robot.chunk
    if config.world_model.model.prediction == "composed":
        config.world_model.model.proprio_dim = robot.state_dim
    config.policy.action_dim = max(config.policy.action_dim, robot.action_dim, robot.state_dim)
    return config.lock()


def allow_prompts_of(config: ml_collections.ConfigDict, tokens: int) -> None:
    """Raises the token budgets of instructions to at least this many."""
    for section in (config.policy, config.world_model):
        section.max_prompt_tokens = max(section.max_prompt_tokens, tokens)


def _paper(suite: str, robot: Embodiment) -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.suite = suite
    c.tasks = tuple(range(10))
    c.robot = ml_collections.ConfigDict(dataclasses.asdict(robot))
    c.cameras = robot.cameras  # decoding order: head first
    c.image_size = 224
    c.chunk = robot.chunk  # k, environment steps per action chunk
    c.action_dim = robot.action_dim
    c.max_steps = 520 if suite == "libero_10" else 300  # environment steps per episode
    c.seed = 0
    c.workers = 16  # simulator processes, 2.5 GB each
    c.loggers = ("tensorboard",)  # also "wandb" and "trackio", where they are installed
    # Of float32 products, as JAX names it: "" for its default. BF16_BF16_F32 multiplies in bfloat16
    # and sums in float32, on GPUs and (in linear maps) on CPUs, some of which have units for it.
    c.matmul_precision = ""
    c.worker_backend = "local"  # or "ray": on the hosts of the cluster that ray.init() finds

    c.parallel = ml_collections.ConfigDict()
    c.parallel.fsdp = 8  # devices over which parameters are split; the others repeat them
    # Dimensions of a parameter that may be split, in order of preference, by a pattern of its name.
    # The layer axis is first and never split: layers are gathered one at a time.
    c.parallel.rules = (
        ("(embedding|input_embedding|pos_embedding)$", (-1,)),  # width; the vocabulary stays whole
        ("(q_einsum|kv_einsum|qkv_einsum)(_1)?/w$", (-2,)),  # [..., heads, width, head]
        ("(query|key|value)/kernel$", (-3,)),  # [..., width, heads, head]
        ("attn_vec_einsum(_1)?/w$|out/kernel$", (-1,)),  # [..., heads, head, width]
        ("(kernel|gating_einsum|linear)$", (-2, -1)),
    )
    c.parallel.world_model = "replicated"  # in policy optimisation; or "sharded", "offloaded"
    c.parallel.rollout = "shard_map"  # or "pmap", for models that fit a device

    c.checkpoints = ml_collections.ConfigDict()
    c.checkpoints.keep = 1  # newest training states kept, beside the best in imagination

    c.profile_steps = ()  # (10, 20): trace steps 10 to 19 of each training, for TensorBoard

    c.pretrained = ml_collections.ConfigDict()  # empty: trained from scratch
    c.pretrained.policy = ""  # openpi's checkpoint directory
    c.pretrained.policy_tokenizer = ""  # PaliGemma's SentencePiece file
    c.pretrained.world_model = ""  # BAGEL's checkpoint directory
    c.pretrained.world_tokenizer = ""  # the directory of Qwen2's tokeniser files

    c.demonstrations = ml_collections.ConfigDict()
    c.demonstrations.episodes_per_task = 50
    c.demonstrations.action_noise = (0.0, 0.1, 0.2)  # a level is drawn per episode
    # Metres by which the expert grasps and puts down from above beside where it means to (one
    # standard deviation): people do not aim alike every time.
    c.demonstrations.aim_error = 0.0
    c.demonstrations.aim_offset = (0.0, 0.0)  # and by which it always does, x and y: a habit
    c.demonstrations.render_every = 5  # steps between stored frames; divides chunk

    policy = dataclasses.asdict(policy_config.variants()["pi05"])
    flow = policy.pop("flow")
    c.policy = ml_collections.ConfigDict(policy)

    c.sft = ml_collections.ConfigDict()
    # Dataset of an earlier run's rollouts, to learn from its successes too (filtered imitation), or
    # with policy.advantage_conditioned from all.
    c.sft.rollouts = ""
    c.sft.steps = 30_000
    c.sft.batch_size = 256
    c.sft.gradient_accumulation = 1  # slices of a batch, one after the other
    c.sft.learning_rate = 2.5e-5
    c.sft.matrix_learning_rate = 0.0  # as in world_model.training
    c.sft.warmup_steps = 1000
    c.sft.weight_decay = 1e-4
    c.sft.grad_clip = 1.0
    c.sft.ema_decay = 0.99
    c.sft.log_every = 100
    c.sft.checkpoint_every = 1000

    c.rollouts = ml_collections.ConfigDict()
    c.rollouts.episodes_per_task = 50
    c.rollouts.render_every = 5  # steps between stored frames; divides chunk
    # Of the chunks' smooth noise, in normalised units: a policy sure of itself shows neither
    # the world model nor the value what other chunks lead to.
    c.rollouts.noise_std = 0.0

    c.world_model = ml_collections.ConfigDict()
    c.world_model.model = ml_collections.ConfigDict(
        dataclasses.asdict(world_config.variant("bagel"))
    )
    c.world_model.max_prompt_tokens = 64
    c.world_model.holdout_fraction = 0.1  # of episodes, for fidelity
    c.world_model.horizon = 4  # chunks of the open-loop error curve
    c.world_model.dynamics_batch_size = 88  # with the reward 35,000 tokens on each of 8 devices
    c.world_model.reward_batch_size = 88
    c.world_model.dynamics_weight = 1.0
    c.world_model.reward_weight = 0.01
    c.world_model.reward_yes_fraction = 0.5  # "Yes" frames are oversampled to this share
    c.world_model.vae_training = _training(steps=0, learning_rate=1e-4)
    c.world_model.vae_training.batch_size = 64
    c.world_model.training = _training(steps=5000, learning_rate=2e-5)

    c.value = ml_collections.ConfigDict()
    c.value.steps = 0  # of fitting the critic to recorded returns before the first update

    c.rl = ml_collections.ConfigDict(dataclasses.asdict(mbpo.Settings()))  # described there
    c.rl.critic_warmup = 50 if suite == "libero_10" else 10
    c.rl.flow = ml_collections.ConfigDict(flow)
    # "ppo", the paper's, or "ranked": SFT goes on with the best of each group of branches
    # (`mbpo_jax.stages.rank_chunks`).
    c.rl.method = "ppo"
    c.rl.ranked = _training(steps=1000, learning_rate=2.5e-6)
    c.rl.ranked.batch_size = 256
    c.rl.ranked.start_states = 1280  # groups
    c.rl.ranked.chunks = 1  # n, the branch length; at its end the value counts
    c.rl.ranked.kept = 2  # best branches of each group
    c.rl.world = "world_model"  # or "simulator": what an exact model would give
    c.rl.start_states_from = "dataset"  # or "episode_start", for full-horizon imagination
    c.rl.start_states = 1280 if suite == "libero_10" else 512  # M branches per refill
    c.rl.imagination_batch = 64  # start states imagined at a time
    c.rl.minibatch_size = 512  # chunks of an update
    c.rl.updates = 301
    c.rl.updates_per_refill = 50 if suite == "libero_10" else 20
    c.rl.value_recompute_every = 10
    c.rl.checkpoint_every = 50  # updates, at least; checkpoints are made where branches are fresh
    c.rl.anchor_batch = 32  # demonstrations in the anchor's loss

    c.fidelity = ml_collections.ConfigDict()
    # Models that lack a part, trained and measured beside the world model; there are also
    # "actions_as_text", "actions_as_embedding" and, for a model that began as a checkpoint,
    # "without_pretraining".
    c.fidelity.ablations = ("independent_views", "frame_by_frame", "separate_reward")

    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.episodes_per_task = 50  # of the 50 shipped init states
    c.evaluation.resets_per_task = 0  # further episodes, from random resets that nothing else uses
    c.evaluation.checkpoint = "last"  # or "best": the state of the highest imagined success
    c.evaluation.best_of = 1  # above 1: the improved policy also acts on the best of so many chunks
    c.evaluation.best_of_chunks = 1  # how far each of them is imagined before the value counts
    c.evaluation.video_size = 256

    c.selection = ml_collections.ConfigDict()
    c.selection.resets_per_task = 200

    c.siblings = ml_collections.ConfigDict()
    c.siblings.start_states = 24
    c.siblings.group_size = 12  # chunks from each, imagined and executed
    return c


def _training(*, steps: int, learning_rate: float) -> ml_collections.ConfigDict:
    t = ml_collections.ConfigDict()
    t.steps = steps
    t.gradient_accumulation = 1
    t.learning_rate = learning_rate
    t.matrix_learning_rate = 0.0  # above 0: Muon moves the matrices of layers, at this rate
    t.warmup_steps = 100
    t.weight_decay = 1e-4
    t.grad_clip = 1.0
    t.ema_decay = 0.99
    t.log_every = 20
    t.checkpoint_every = 500
    return t


def _set_model(c: ml_collections.ConfigDict, variant: str) -> None:
    policy = dataclasses.asdict(policy_config.variants()[variant])
    c.rl.flow = ml_collections.ConfigDict(policy.pop("flow"))
    c.policy = ml_collections.ConfigDict(policy)
    c.world_model.model = ml_collections.ConfigDict(
        dataclasses.asdict(world_config.variant(variant))
    )


def _make_micro(c: ml_collections.ConfigDict) -> None:
    _set_model(c, "micro")
    c.tasks = (5,)
    c.image_size = 64
    c.workers = 2
    c.max_steps = 160  # the scripted expert needs about 80
    c.matmul_precision = "BF16_BF16_F32"
    c.parallel.fsdp = 1
    # What scripted demonstrations lack of people's: many ways to do the same, so that the policy
    # has better and worse chunks to choose among (docs/what_we_tried.md).
    c.demonstrations.episodes_per_task = 256
    c.demonstrations.aim_error = 0.02

    c.sft.steps = 3000
    c.sft.batch_size = 32
    c.sft.learning_rate = 1.5e-3
    c.sft.matrix_learning_rate = 0.02
    c.sft.warmup_steps = 50
    c.sft.log_every = 20
    c.sft.checkpoint_every = 200

    c.rollouts.noise_std = 0.08

    w = c.world_model
    w.max_prompt_tokens = 16
    w.dynamics_batch_size = 32
    w.reward_batch_size = 16
    w.reward_weight = 0.1
    w.training.steps = 1100
    w.training.learning_rate = 1.5e-3
    w.training.matrix_learning_rate = 0.02
    w.training.weight_decay = 0.05
    w.training.ema_decay = 0.995
    w.training.checkpoint_every = 200

    c.evaluation.best_of = 16
    c.value.steps = 2000
    c.rl.method = "ranked"
    c.rl.ranked.update({"steps": 800, "learning_rate": 3e-4, "matrix_learning_rate": 0.004})
    c.rl.ranked.update({"batch_size": 32, "start_states": 1920, "warmup_steps": 20})
    c.rl.ranked.update({"ema_decay": 0.99, "checkpoint_every": 200})
    # Of rl.method=ppo: 16 branches from every start, compared with each other by the probability of
    # success on the way and the value at their ends.
    c.rl.flow.method = "smooth"
    c.rl.flow.noise_std = 0.08
    c.rl.flow.steps = 5  # as the policy acts
    c.rl.branch_chunks = 4
    c.rl.group_size = 16
    c.rl.reward_threshold = 0.0
    c.rl.start_states = 256
    c.rl.imagination_batch = 64
    c.rl.minibatch_size = 256
    c.rl.gradient_accumulation = 1
    c.rl.updates = 240
    c.rl.updates_per_refill = 8
    c.rl.value_recompute_every = 8
    c.rl.checkpoint_every = 40
    c.rl.critic_warmup = 0
    c.rl.actor_lr = 6e-6
    c.rl.critic_lr = 1e-5
    c.rl.clip_ratio = 0.2
    c.rl.dual_clip = 3.0
    c.rl.anchor_weight = 5.0


def _give_a_habit(c: ml_collections.ConfigDict) -> None:
    """What more imitation does not mend: every demonstration misses to the same side.

    The scripted expert does task 5 so in about 28 of 100 attempts; only successes are kept.
    """
    c.demonstrations.episodes_per_task = 128
    c.demonstrations.aim_error = 0.015
    c.demonstrations.aim_offset = (0.0, 0.03)


def _make_tiny(c: ml_collections.ConfigDict) -> None:
    c.matmul_precision = ""
    c.max_steps = 150
    for part in ("vision", "language", "expert"):
        c.policy[part].depth = 1
    c.policy.unroll = False
    c.demonstrations.episodes_per_task = 2
    c.sft.update({"steps": 4, "log_every": 2, "checkpoint_every": 2, "batch_size": 4})
    c.rollouts.episodes_per_task = 2

    w = c.world_model
    w.update({"dynamics_batch_size": 2, "reward_batch_size": 2, "holdout_fraction": 0.5})
    w.horizon = 2
    w.model.mot.update({"num_layers": 1, "unroll": False})
    w.model.vit.num_layers = 1
    w.training.update({"steps": 2, "log_every": 1})

    c.rl.ranked.update({"steps": 2, "start_states": 4, "kept": 1, "log_every": 1})
    c.rl.update({"start_states": 4, "imagination_batch": 2, "minibatch_size": 4})
    c.rl.update({"group_size": 2, "branch_chunks": 2, "dual_clip": 0.0})
    c.value.steps = 10
    c.rl.update({"updates": 4, "updates_per_refill": 2, "value_recompute_every": 1})
    c.rl.update({"critic_warmup": 1, "checkpoint_every": 2})
    c.evaluation.update({"episodes_per_task": 2, "video_size": 64, "best_of": 2})
    c.selection.resets_per_task = 2
    c.siblings.update({"start_states": 2, "group_size": 2})


def _make_mini(c: ml_collections.ConfigDict) -> None:
    allow_prompts_of(c, 24)  # also for the longer instructions of the other tasks
    c.tasks = (0, 1, 2, 5)
    c.max_steps = 360  # the scripted expert needs about 180
    c.demonstrations.episodes_per_task = 40
    c.sft.steps = 4000
    c.rollouts.episodes_per_task = 20
    c.world_model.training.steps = 1500
    c.evaluation.episodes_per_task = 25
    c.evaluation.best_of = 1


def _make_small(c: ml_collections.ConfigDict) -> None:
    _set_model(c, "small")
    c.image_size = 128
    c.workers = 8
    c.parallel.fsdp = 1

    c.sft.steps = 20_000
    c.sft.batch_size = 128
    c.sft.learning_rate = 3e-4

    w = c.world_model
    w.dynamics_batch_size = 64
    w.reward_batch_size = 64
    w.training.steps = 7500  # the longest stage: docs/speed.md has its FLOP
    w.training.learning_rate = 5e-4
    w.training.matrix_learning_rate = 0.01

    c.rollouts.noise_std = 0.08
    c.value.steps = 5000
    c.rl.flow.method = "smooth"
    c.rl.flow.noise_std = 0.08
    c.rl.flow.steps = 10
    c.rl.branch_chunks = 4
    c.rl.group_size = 16
    c.rl.reward_threshold = 0.0
    c.rl.start_states = 512
    c.rl.gradient_accumulation = 1
    c.rl.actor_lr = 6e-6
    c.rl.critic_lr = 1e-5
    c.rl.anchor_weight = 5.0
