"""Restores the working directory that `python -m experiments.pack` has packed.

python -m experiments.unpack improve.tar --workdir=DIR
"""

import argparse
import sys
from pathlib import Path

from experiments.pack import unpack
from mbpo_jax.stages.workspace import StageError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="a file made by experiments.pack")
    parser.add_argument("--workdir", type=Path, required=True, help="the folder to be written")
    options = parser.parse_args(arguments)
    try:
        stage = unpack(options.archive, options.workdir)
    except (StageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.workdir} is ready for: --stages={stage} --workdir={options.workdir}, with the "
        "config and overrides of the run that was packed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
