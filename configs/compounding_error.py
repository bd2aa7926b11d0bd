"""The compounding-error laboratory: value-gap bounds checked on exact tabular chunk MDPs.

No simulator and no network: CPU, float64. Both variants write results.json, CSV tables, PNG
figures and a self-contained report.html.

    python -m experiments.compounding_error                                            # quick
    python -m experiments.compounding_error --config=configs/compounding_error.py:full
    python -m experiments.compounding_error --config.gamma=0.95 --workdir=runs/gamma95

quick: under 2 minutes on 2 CPU cores. full: more problems, restarts, γ's and episodes.
Expected: no corrected bound is exceeded (largest ratio below 1, above 0.95 for an adversary);
published bounds are exceeded where rewards are accumulated in the model.
"""

import difflib

from ml_collections import ConfigDict

VARIANTS = ("quick", "full")


def get_config(variant: str = "quick") -> ConfigDict:
    """The locked config of a variant; ValueError naming the nearest known one otherwise."""
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no variant {variant!r}; did you mean {near!r}? One of {VARIANTS}")
    config = ConfigDict()
    config.variant = variant
    config.seed = 0
    config.gamma = 0.99  # discount per step, of every study but the adversarial one
    config.k = 10  # steps in a chunk, in the case study and the coefficient plots
    config.n = 2  # chunks in a branch, likewise and in the learned models' gap plot
    config.r_max = 1.0  # reward bound of the coefficients; the MDPs have |r| ≤ 1

    config.coefficients = ConfigDict()
    config.coefficients.n_max = 20
    config.coefficients.k_max = 50
    config.coefficients.gamma_min = 0.5
    config.coefficients.gamma_max = 0.999
    config.coefficients.points = 60  # values of γ

    config.random = ConfigDict()
    config.random.problems = 10_000
    config.random.batch = 500  # problems in memory at a time
    config.random.states = 8
    config.random.actions = 2
    config.random.k = 3
    config.random.ns = (1, 2, 4)

    config.adversarial = ConfigDict()
    config.adversarial.ks = (1, 2)  # paired with ns
    config.adversarial.ns = (1, 2)
    config.adversarial.gammas = (0.3, 0.9)
    config.adversarial.states = 3
    config.adversarial.actions = 2
    config.adversarial.restarts = 4  # for each bound and γ
    config.adversarial.steps = 250
    config.adversarial.learning_rate = 0.1

    config.trade_off = ConfigDict()
    config.trade_off.family = "absorbing"  # slow mixing: errors have time to compound
    config.trade_off.states = 8
    config.trade_off.actions = 2
    config.trade_off.k = 3
    config.trade_off.n_max = 32
    config.trade_off.problems = 32
    config.trade_off.policy_size = 0.3  # of the curves: ε_π is at most this
    config.trade_off.model_size = 0.03  # of the curves: chunk error is at most this
    config.trade_off.grid_min = 0.003  # of the maps, for both sizes
    config.trade_off.grid_max = 1.0
    config.trade_off.grid_points = 6

    config.learned = ConfigDict()
    config.learned.family = "absorbing"
    config.learned.states = 8
    config.learned.actions = 2
    config.learned.k = 3
    config.learned.n_max = 32
    config.learned.horizon = 30  # chunks of the compounding-error curves
    config.learned.episodes = (10, 30, 100, 300, 1000, 3000, 10_000)
    config.learned.length = 10  # chunks in an episode
    config.learned.problems = 16
    config.learned.smoothing = 1.0  # observations' worth of a uniform guess
    config.learned.floor = 0.02  # error per prediction that data does not remove
    config.learned.policy_size = 0.5

    if variant == "full":
        config.random.problems = 100_000
        config.adversarial.ks = (1, 2, 2, 3, 1)
        config.adversarial.ns = (1, 2, 4, 1, 3)
        config.adversarial.gammas = (0.1, 0.3, 0.6, 0.9, 0.99)
        config.adversarial.restarts = 24
        config.adversarial.steps = 800
        config.trade_off.problems = 128
        config.trade_off.grid_points = 10
        config.learned.episodes = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000)
        config.learned.problems = 64
    config.lock()
    return config
