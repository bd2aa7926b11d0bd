"""The methods of the paper's comparisons, from one fine-tuned policy (docs/comparisons.md).

    python -m experiments.compare
    python -m experiments.compare --methods=bc_on_rollouts,vla_mbpo,best_of_n --seeds=0,1,2
    python -m experiments.compare --config=configs/libero_long.py:small --workdir=DIR
    python -m experiments.compare --methods=mopo --compare.mopo.beta=0.5 --workdir=OTHER

Per seed, demonstrations, fine-tuned policy, rollouts, world model and value are made once. Each
method then trains, with the same real episodes, and is evaluated from the same random resets
(--config.evaluation.resets_per_task) and shipped init states
(--config.evaluation.episodes_per_task) as the fine-tuned policy. Started again, the command
continues; what is finished is not run again, so methods and seeds may be added. Writes
`compare.html` and `compare.json`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.compare import DEFAULT, DESCRIPTIONS
from experiments.compare.settings import get_settings
from experiments.libero_long import CONFIG_DIRECTORY, one_message, parse_flags
from experiments.shared_stages import continued


def seeds_of(values: Sequence[str]) -> list[int]:
    """Raises ValueError where one is no whole number in range, or given twice."""
    from mbpo_jax.seeds import LARGEST_SEED

    for value in values:
        if not value.isdecimal() or int(value) > LARGEST_SEED:
            raise ValueError(
                f"--seeds holds {value!r}: seeds are whole numbers from 0 to {LARGEST_SEED}"
            )
    seeds = [int(value) for value in values]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(values)}: give one or more, each once")
    return seeds


def compare(
    config: ml_collections.ConfigDict,
    settings: ml_collections.ConfigDict,
    root: Path,
    names: Sequence[str],
    seeds: Sequence[str],
) -> None:
    """Runs what is missing and writes the page; what the user can mend is one message."""
    numbers = seeds_of(seeds)
    from experiments.compare import report, runs  # after the seeds, so that a typo is told at once
    from experiments.compare.methods import check_budgets, chosen

    with continued(root):
        methods = chosen(names)
        whole = runs.merged(config, settings)
        budget = check_budgets(whole, methods)

        def write():
            results = report.collect(whole, root, methods, numbers)
            (root / "compare.json").write_text(json.dumps(results, indent=1))
            (root / "compare.html").write_text(report.page(whole, results, budget))
            print(report.plain(report.table(results)))
            print("\n" + report.plain(report.between(results)))
            print(root / "compare.html", flush=True)

        runs.run(whole, root, methods, numbers, write)


def main() -> None:
    with one_message():
        config = config_flags.DEFINE_config_file(
            "config",
            f"{CONFIG_DIRECTORY}/libero_long.py:micro",
            "configs/SUITE.py:VARIANT; any entry can be overridden",
        )
        settings = config_flags.DEFINE_config_dict(
            "compare", get_settings(), "settings of the methods (experiments/compare/settings.py)"
        )
        workdir = flags.DEFINE_string("workdir", "runs/compare", "where all is written")
        methods = flags.DEFINE_list(
            "methods",
            list(DEFAULT),
            "comma-separated, sft is always among them:\n"
            + "\n".join(f"{name}: {what}" for name, what in DESCRIPTIONS.items()),
        )
        seeds = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of whole runs")

    def start(_):
        logging.set_verbosity(logging.WARNING)
        with one_message():
            compare(config.value, settings.value, Path(workdir.value), methods.value, seeds.value)

    app.run(start, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
