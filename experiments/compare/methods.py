"""What each method trains, how it acts, and what it costs in reality."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import ml_collections

from experiments.branch_length import with_branches
from experiments.compare import DESCRIPTIONS, idql, imitation, online, penalties, recap, reinbot
from experiments.shared_stages import SHARED_STAGES
from mbpo_jax.stages.acting import Act, load_selection
from mbpo_jax.stages.build import Config, load_policy
from mbpo_jax.stages.improve_policy import improve_policy
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.types import Params


def trained(workspace: Workspace) -> tuple[Act, Params]:
    """Acts with the policy that the method left."""
    return _policy(workspace, workspace.directory("improve"))


def fine_tuned(workspace: Workspace) -> tuple[Act, Params]:
    """Acts with the policy that all methods start from."""
    return _policy(workspace, workspace.directory("sft"))


def noiseless(workspace: Workspace, stage: str) -> tuple[Act, Params]:
    """Acts with the policy that a stage left, without the initial noise of its flow."""
    policy, params = load_policy(
        workspace.config, workspace.directory("sft"), workspace.directory(stage) / "policy"
    )
    return lambda params, observation, key: policy.act(params, observation, None), params


def best_of_n(workspace: Workspace, stage: str) -> tuple[Act, Params]:
    """Acts on the best of some imagined chunks of the policy that a stage left."""
    return load_selection(workspace.config, workspace.root, workspace.directory(stage) / "policy")


def _policy(workspace: Workspace, directory: Path) -> tuple[Act, Params]:
    policy, params = load_policy(workspace.config, workspace.directory("sft"), directory / "policy")
    return policy.act, params


def _choosing(config: Config) -> Config:
    config.evaluation.best_of = config.compare.best_of.chunks_to_choose_from
    return config


def _branches(length: str) -> Callable[[Config], Config]:
    return lambda config: with_branches(_by("ppo")(config), length)


def _by(method: str, **entries: bool) -> Callable[[Config], Config]:
    def configure(config: Config) -> Config:
        config.rl.update({"method": method, **entries})
        return config

    return configure


def _rollouts(config: Config) -> int:
    return config.rollouts.episodes_per_task * len(config.tasks)


def _whole_episodes(config: Config) -> int:
    rl = config.rl
    return rl.updates // rl.updates_per_refill * rl.start_states


@dataclass(frozen=True)
class Method:
    """One way to make use of the rollouts.

    train: `(workspace, directory) -> summary` as a stage's `run`; None where nothing is trained.
    trained_by: the method whose training it acts on, if not its own.
    actor: `workspace -> (acting function, its parameters)`.
    configure: gives the method's config, locked or not, from an unlocked copy of the run's.
    needs: the last of the shared stages that it uses.
    settings: further entries that it depends on.
    episodes: real ones beside the demonstrations, by the method's config; `over_budget` says that
        they may be more than the rollouts.
    """

    train: Callable[[Workspace, Path], dict] | None = None
    actor: Callable[[Workspace], tuple[Act, Params]] = trained
    configure: Callable[[Config], Config] = lambda config: config
    needs: str = "value"
    settings: Sequence[str] = ()
    trained_by: str = ""
    episodes: Callable[[Config], int] = _rollouts
    over_budget: bool = False

    @property
    def shared(self) -> Sequence[str]:
        """The shared stages that it uses, in order."""
        return SHARED_STAGES[: SHARED_STAGES.index(self.needs) + 1]

    def config(self, config: Config) -> Config:
        """The method's config, locked, from the run's."""
        own = self.configure(ml_collections.ConfigDict(config.to_dict()))
        return own if own.is_locked else own.lock()


METHODS = {
    "sft": Method(actor=fine_tuned, needs="sft", episodes=lambda config: 0),
    "noiseless": Method(
        actor=partial(noiseless, stage="sft"), needs="sft", episodes=lambda config: 0
    ),
    "bc_on_rollouts": Method(imitation.on_rollouts, needs="rollouts"),
    "bc_in_world_model": Method(imitation.in_world_model, needs="world_model"),
    "vla_mbpo": Method(improve_policy, configure=_by("ppo")),
    "vla_mbpo_1": Method(improve_policy, configure=_branches("1")),
    "vla_mbpo_2": Method(improve_policy, configure=_branches("2")),
    "vla_mbpo_4": Method(improve_policy, configure=_branches("4")),
    "vla_mbpo_full_horizon": Method(improve_policy, configure=_branches("full")),
    "ranked": Method(improve_policy, configure=_by("ranked")),
    "ranked_control": Method(improve_policy, configure=_by("ranked", exchange_advantages=True)),
    "ranked_noiseless": Method(
        actor=partial(noiseless, stage="improve"), configure=_by("ranked"), trained_by="ranked"
    ),
    "ranked_control_noiseless": Method(
        actor=partial(noiseless, stage="improve"),
        configure=_by("ranked", exchange_advantages=True),
        trained_by="ranked_control",
    ),
    "best_of_n": Method(
        actor=partial(best_of_n, stage="sft"),
        configure=_choosing,
        settings=("compare.best_of",),
    ),
    "ranked_best_of_n": Method(
        actor=partial(best_of_n, stage="improve"),
        configure=lambda config: _choosing(_by("ranked")(config)),
        settings=("compare.best_of",),
        trained_by="ranked",
    ),
    "online_ppo": Method(
        online.train,
        configure=online.with_episodes,
        needs="rollouts",
        settings=("compare.online",),
        episodes=_whole_episodes,
    ),
    "online_ppo_large": Method(
        online.train,
        configure=lambda c: online.with_episodes(c, c.compare.online.large_factor),
        needs="rollouts",
        settings=("compare.online",),
        episodes=_whole_episodes,
        over_budget=True,
    ),
    "mopo": Method(
        penalties.mopo, configure=_by("ppo"), settings=("compare.dynamics", "compare.mopo")
    ),
    "mobile": Method(
        penalties.mobile, configure=_by("ppo"), settings=("compare.dynamics", "compare.mobile")
    ),
    "idql": Method(
        idql.train, idql.actor, needs="rollouts", settings=("compare.idql", "compare.best_of")
    ),
    "recap": Method(
        recap.train,
        recap.actor,
        needs="rollouts",
        settings=("compare.recap",),
    ),
    "reinbot": Method(
        reinbot.train,
        reinbot.actor,
        needs="rollouts",
        settings=("compare.reinbot",),
    ),
}


def chosen(names: Sequence[str]) -> dict[str, Method]:
    """The named methods after `sft`, which all are compared with.

    Raises:
        ValueError: an unknown name, with the nearest known ones; a name given twice.
    """
    for name in names:
        if name not in METHODS:
            near = get_close_matches(name, DESCRIPTIONS, n=2)
            raise ValueError(
                f"--methods holds {name!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
                + f" Methods: {', '.join(METHODS)}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"--methods names a method twice: {', '.join(names)}")
    return {name: METHODS[name] for name in dict.fromkeys(["sft", *names])}


def check_budgets(config: Config, methods: Sequence[str]) -> int:
    """The real episodes that every method may use beside the demonstrations: as many as rollouts.

    Raises:
        ValueError: a method uses more, unless that is what it is for.
    """
    budget = _rollouts(config)
    if config.sft.rollouts:
        raise ValueError(
            f"sft.rollouts = {config.sft.rollouts} gives the fine-tuned policy episodes beyond the "
            f"common budget of {budget}: leave it empty; bc_on_rollouts is that comparison"
        )
    for name in methods:
        method = METHODS[name]
        episodes = method.episodes(method.config(config))
        if episodes > budget and not method.over_budget:
            raise ValueError(
                f"{name} would use {episodes} real episodes, the others {budget}: methods are "
                "compared at one budget"
            )
    return budget
