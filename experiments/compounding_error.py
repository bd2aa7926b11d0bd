"""Are the value-gap theorems right, and how long should a branch be? Exact tabular answers.

    python -m experiments.compounding_error                     # quick, under 2 minutes on 2 cores
    python -m experiments.compounding_error --config=configs/compounding_error.py:full
    python -m experiments.compounding_error --config.gamma=0.95 --workdir=runs/gamma95
    python -m experiments.compounding_error --case_study        # one JSON line, nothing else

Writes results.json, tables/, figures/, counterexamples/ and report.html into --workdir. Every
number of configs/compounding_error.py can be overridden: --config.random.problems=1000.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from configs import compounding_error as default_config
from experiments.libero_long import one_message, parse_flags
from experiments.theory import bounds, families, paragraphs, report, studies
from mbpo_jax.stages.entries import (
    BELOW_ONE,
    COUNT_OR_NONE,
    POSITIVE,
    SHARE,
    Number,
    check_entries,
)

with one_message():
    _CONFIG = config_flags.DEFINE_config_file(
        "config",
        f"{default_config.__file__}:quick",
        "Config file and variant, configs/compounding_error.py:quick or :full. Any entry can be "
        "overridden, e.g. --config.gamma=0.95 --config.learned.episodes='(10, 100)'.",
        lock_config=True,
    )
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for the results; default runs/compounding_error_<variant>."
)
_CASE_STUDY = flags.DEFINE_bool(
    "case_study",
    False,
    "Print the published coefficients at the config's gamma, k, n and r_max as one JSON line.",
)

NUMBERS = {  # what those of the config may be that are no counts
    "seed": COUNT_OR_NONE,
    "n": COUNT_OR_NONE,
    "gamma": BELOW_ONE,
    "adversarial.gammas": BELOW_ONE,
    "coefficients.gamma_*": BELOW_ONE,
    "r_max": Number(),
    "adversarial.learning_rate": POSITIVE,
    "trade_off.grid_m*": Number(high=1, above=True),
    "*_size": SHARE,
    "learned.smoothing": Number(),
    "learned.floor": SHARE,
}


def _progress(label: str):
    return lambda jobs: tqdm(jobs, desc=label, file=sys.stderr, dynamic_ncols=True)


def _corrected_case_study(config: ConfigDict) -> dict:
    out = {}
    for rewards in bounds.REWARDS:
        full = bounds.corrected_full_horizon(config.gamma, config.k, config.r_max, rewards=rewards)
        branch = bounds.corrected_branched(
            config.gamma, config.k, config.n, config.r_max, rewards=rewards
        )
        for name, factors in (("full horizon", full), (f"branch n = {config.n}", branch)):
            out[f"{name}, rewards {rewards}"] = {
                "eps_pi": float(factors.eps_pi),
                "eps_m": float(factors.eps_m),
            }
    return out


def run(config: ConfigDict) -> dict:
    """All studies: a JSON-ready dict that depends on the config alone."""
    keys = jax.random.split(jax.random.key(config.seed), 4)
    gamma, plots, learn = config.gamma, config.coefficients, config.learned.to_dict()
    trade = config.trade_off.to_dict()
    grid = (trade.pop("grid_min"), trade.pop("grid_max"), trade.pop("grid_points"))
    adversarial = config.adversarial.to_dict()
    pairs = list(zip(adversarial.pop("ks"), adversarial.pop("ns"), strict=True))
    random = config.random.to_dict()
    results = {
        "config": config.to_dict(),
        "case_study": studies.case_study(gamma, config.k, config.n, config.r_max),
        "corrected_case_study": _corrected_case_study(config),
        "coefficients": studies.coefficients(
            gamma,
            config.k,
            config.n,
            config.r_max,
            n_max=plots.n_max,
            ks=range(1, plots.k_max + 1),
            gammas=1 - np.geomspace(1 - plots.gamma_min, 1 - plots.gamma_max, plots.points),
        ),
        "random": studies.random_claims(
            keys[0], gamma=gamma, progress=_progress("random problems"), **random
        ),
        "adversarial": studies.adversarial_claims(
            keys[1],
            chunks_and_branches=pairs,
            progress=_progress("adversarial search"),
            **adversarial,
        ),
        "trade_off": studies.trade_off(
            keys[2], gamma=gamma, grid=grid, progress=_progress("trade-off"), **trade
        ),
        "learned": studies.learned_models(
            keys[3], gamma=gamma, progress=_progress("learned models"), **learn
        ),
    }
    return studies.rounded(results)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options start with --")
    config = _CONFIG.value
    with one_message():
        check_entries(config, NUMBERS, {"*.family": tuple(families.FAMILIES)})
    if _CASE_STUDY.value:
        print(json.dumps(studies.case_study(config.gamma, config.k, config.n, config.r_max)))
        return
    workdir = Path(_WORKDIR.value or f"runs/compounding_error_{config.variant}")
    start = time.monotonic()
    with one_message():
        workdir.mkdir(parents=True, exist_ok=True)
        with jax.enable_x64(True):
            results = run(config)
        report.write(results, workdir)
    print(paragraphs.case_study(results))
    print(paragraphs.ratios(results))
    print(f"{time.monotonic() - start:.0f} s; report: {workdir / 'report.html'}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
