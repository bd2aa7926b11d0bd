"""Writes a run's episodes in a format that others read.

    python -m experiments.export_data --format=lerobot --source=DIR/demonstrations/dataset \\
        --target=PATH

lerobot: a dataset of codebase version 3.0, with one row for each environment step.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from experiments.arguments import number


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=["lerobot"], required=True)
    parser.add_argument("--source", type=Path, required=True, help="a stage's folder `dataset`")
    parser.add_argument("--target", type=Path, required=True, help="the folder to be written")
    parser.add_argument(
        "--control_rate",
        type=number(int, 1, 100_000),
        default=20,
        help="environment steps a second (20: LIBERO's)",
    )
    options = parser.parse_args(arguments)
    try:
        from mbpo_jax.data.episodes import iterate_episodes
        from mbpo_jax.data.formats.export_lerobot import export_lerobot
    except ModuleNotFoundError as error:
        parser.error(f"needs the package {error.name}: pip install -e '.[import]'")
    try:
        episodes = tqdm(iterate_episodes(options.source), desc="writing", unit="ep")
        count = export_lerobot(options.target, episodes, options.control_rate)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} episodes in {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
