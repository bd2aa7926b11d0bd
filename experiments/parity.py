"""Compares a model with golden arrays of its public implementation.

python -m experiments.parity --suite=pi05 --fixtures=tests/fixtures/pi05
python -m experiments.parity --suite=bagel --fixtures=tests/fixtures/bagel

Prints each array's largest difference (relative where values exceed 1) beside its tolerance; the
exit code is 0 only if every array is within it.
"""

import argparse
import importlib
import sys
import zipfile
from pathlib import Path

SUITES = {
    "pi05": ("experiments.parity_suites.pi05", "experiments.parity_suites.gae_ppo"),
    "bagel": ("experiments.parity_suites.bagel",),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--fixtures", type=Path, required=True, help="folder with golden arrays")
    options = parser.parse_args(arguments)
    if not options.fixtures.is_dir():
        parser.error(f"--fixtures: {options.fixtures} is not a folder")
    try:
        suites = [importlib.import_module(name) for name in SUITES[options.suite]]
        rows = [row for suite in suites for row in suite.run(options.fixtures)]
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        parser.error(f"{options.fixtures}: {error}")
    width = max(len(name) for name, *_ in rows)
    print(f"{'array':{width}}  {'difference':>10}  {'tolerance':>9}")
    for name, difference, tolerance, within in rows:
        print(f"{name:{width}}  {difference:10.1e}  {tolerance:9.0e}  {'ok' if within else 'FAIL'}")
    failed = sum(not within for *_, within in rows)
    print(f"{len(rows) - failed} of {len(rows)} arrays within tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
