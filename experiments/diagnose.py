"""Prints the gates of a run: does its imagination follow the actions, does its value tell success
from failure, does choosing among imagined chunks help, did policy optimisation?

    python -m experiments.diagnose --workdir=runs/libero_long_micro
    python -m experiments.diagnose --pool=docs/results

Exits with 1 where a gate is missed. Figures of selection come from
`python -m experiments.libero_long --stages=selection`, those of random resets from
`--config.evaluation.resets_per_task=200`.
"""

import sys
from pathlib import Path

from absl import app, flags

from mbpo_jax.reporting.diagnose import gates, read_pool, read_summaries, table
from mbpo_jax.stages.workspace import StageError, Workspace, read_config

WORKDIR = flags.DEFINE_string("workdir", None, "working directory of a run")
POOL = flags.DEFINE_string("pool", None, "folder with the results.json of several runs")


def main(_: list[str]) -> None:
    try:
        if (WORKDIR.value is None) == (POOL.value is None):
            raise StageError("name either --workdir or --pool")
        if POOL.value:
            runs = read_pool(Path(POOL.value))
        else:
            root = Path(WORKDIR.value)
            runs = [read_summaries(Workspace(root, read_config(root)))]
        found = gates(runs)
    except (StageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        folder = POOL.value or WORKDIR.value
        print(
            f"error: the results in {folder} are not those of a run of this version ({error!r}): "
            "copy them again, or run the stages again",
            file=sys.stderr,
        )
        sys.exit(1)
    print(table(found))
    sys.exit(0 if all(gate.reached for gate in found) else 1)


if __name__ == "__main__":
    app.run(main)
