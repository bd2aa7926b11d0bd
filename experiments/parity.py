"""Compares a model with golden arrays of its public implementation.

python -m experiments.parity --suite=pi05 --fixtures=tests/fixtures/pi05
python -m experiments.parity --suite=bagel --fixtures=tests/fixtures/bagel

Prints each array's largest difference (relative where values exceed 1) beside its tolerance; the
exit code is 0 only if every array is within it.

Products are computed in full float32, also on GPUs. With --precision=tf32 their factors are rounded
to TF32 (10 bits of mantissa) where the device does that (NVIDIA's from A100 on), and tolerances are
1000 times as wide; what must agree exactly still must.
"""

import argparse
import importlib
import sys
import zipfile
from pathlib import Path

import jax

PRECISIONS = {  # name -> as JAX calls it, and the factor of all tolerances
    "float32": ("highest", 1.0),
    "tf32": ("tensorfloat32", 1000.0),
}
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
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="float32")
    options = parser.parse_args(arguments)
    if not options.fixtures.is_dir():
        parser.error(f"--fixtures: {options.fixtures} is not a folder")
    try:
        suites = [importlib.import_module(name) for name in SUITES[options.suite]]
        precision, factor = PRECISIONS[options.precision]
        with jax.default_matmul_precision(precision):
            rows = [row for suite in suites for row in suite.run(options.fixtures)]
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        parser.error(f"{options.fixtures}: {error}")
    rows = [(name, x, factor * limit, x <= factor * limit) for name, x, limit, _ in rows]
    width = max(len(name) for name, *_ in rows)
    print(f"{'array':{width}}  {'difference':>10}  {'tolerance':>9}")
    for name, difference, tolerance, within in rows:
        print(f"{name:{width}}  {difference:10.1e}  {tolerance:9.0e}  {'ok' if within else 'FAIL'}")
    failed = sum(not within for *_, within in rows)
    print(f"{len(rows) - failed} of {len(rows)} arrays within tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
