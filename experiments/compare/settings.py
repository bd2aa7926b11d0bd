"""What the compared methods have beside a run's config; any entry can be overridden, as in
--compare.mopo.beta=0.5."""

import ml_collections


def get_settings() -> ml_collections.ConfigDict:
    """The locked defaults: one section for each part that some methods share."""
    c = ml_collections.ConfigDict()
    c.best_of = ml_collections.ConfigDict()
    c.best_of.chunks_to_choose_from = 16  # best_of_n and idql

    c.online = ml_collections.ConfigDict()
    c.online.refills = 5  # at most; the episodes are shared out evenly among them
    c.online.large_factor = 10  # online_ppo_large: episodes, in budgets

    c.dynamics = ml_collections.ConfigDict()  # the members behind both penalties
    c.dynamics.members = 5
    c.dynamics.width = 256  # of two hidden layers
    c.dynamics.steps = 2000
    c.mopo = ml_collections.ConfigDict({"beta": 0.1})
    c.mobile = ml_collections.ConfigDict({"beta": 1.0})

    c.idql = ml_collections.ConfigDict()
    c.idql.steps = 5000
    c.idql.width = 256  # of two hidden layers
    c.idql.expectile = 0.7
    c.idql.target_rate = 0.005  # of the target of Q, per step

    c.recap = ml_collections.ConfigDict()
    c.recap.positive_share = 0.3  # of a task's rollout chunks
    c.recap.condition_dropout = 0.1  # share of examples that do not see their label
    c.recap.guidance = 1.5  # when acting
    c.recap.failure_penalty = 1.0  # in lengths of the longest episode
    c.recap.value_steps = 2000

    c.reinbot = ml_collections.ConfigDict()
    c.reinbot.nearness = 0.1  # weights of the dense reward, beside 1 for success
    c.reinbot.progress = 0.1
    c.reinbot.smoothness = 0.1
    c.reinbot.levels = 16  # of the return that the policy is asked for
    c.reinbot.expectile = 0.9
    c.reinbot.width = 256  # of two hidden layers
    c.reinbot.expected_steps = 2000
    return c.lock()
