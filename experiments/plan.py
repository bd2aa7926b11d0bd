"""What a run needs and takes on many accelerators, computed without them.

python -m experiments.plan --config=configs/libero_long.py:paper --devices=8 --device_memory_gib=80

Compiles every step of the config ahead of time for abstract parameters on virtual CPU devices and
prints, per device: memory, matrix products, bytes of collectives by kind and mesh axis, the least
time on H100s (from data-sheet peaks: a bound, not a forecast), the stages' hours, and where
communication begins to dominate on more devices. The exit status is 1 if a step does not fit.

    python -m experiments.plan --config=configs/libero_long.py:micro --weak_scaling=1,2,4,8

prints instead what each step costs a device on more and more devices whose batches stay the same.

The CPU's compiler computes bfloat16 products in float32, and keeps float32 copies of their
operands: temporaries are above those of a GPU.
"""

import json
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from experiments.benchmarks import plan
from experiments.libero_long import CONFIG_DIRECTORY, one_message, parse_flags
from mbpo_jax.stages.limits import check_config

with one_message():
    CONFIG = config_flags.DEFINE_config_file(
        "config", str(CONFIG_DIRECTORY / "libero_long.py:paper"), "a config file and variant"
    )
DEVICES = flags.DEFINE_integer("devices", 8, "virtual devices to compile for", 1, 4096)
MEMORY = flags.DEFINE_float("device_memory_gib", 80.0, "memory of a device", 0.001, 1e6)
ONLY = flags.DEFINE_string("only", "", "compile the steps whose name contains this")
WEAK_SCALING = flags.DEFINE_list("weak_scaling", [], "numbers of devices to compare")
OUTPUT = flags.DEFINE_string("output", None, "a JSON file for the numbers")
MORE_DEVICES = (64, 512)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags begin with --")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    with one_message():
        check_config(CONFIG.value)
        counts = _device_counts()
    if WEAK_SCALING.value:
        with one_message():
            scaling = plan.weak_scaling(CONFIG.value, jax.devices(), counts, ONLY.value)
        print(plan.weak_scaling_table(scaling))
        return
    with one_message():
        mesh, measured = plan.plan(CONFIG.value, jax.devices(), ONLY.value)
    budget = MEMORY.value * plan.USABLE * plan.GIB
    print(plan.memory_table(measured, budget))
    print(plan.collectives_table(measured))
    print(plan.time_table(measured, plan.H100, DEVICES.value))
    print(plan.scaling_table(measured, plan.H100, mesh, MORE_DEVICES))
    if OUTPUT.value:
        with one_message():
            Path(OUTPUT.value).write_text(json.dumps([m.numbers() for m in measured], indent=1))
    too_large = [m.step.name for m in measured if m.total > budget]
    if too_large:
        print(f"does not fit {MEMORY.value:g} GiB: {', '.join(too_large)}", file=sys.stderr)
        sys.exit(1)


def _device_counts() -> tuple[int, ...]:
    """Raises ValueError for numbers of devices that there are not."""
    texts = WEAK_SCALING.value
    if not all(text.isdigit() and 1 <= int(text) <= DEVICES.value for text in texts):
        raise ValueError(f"--weak_scaling={','.join(texts)}: numbers from 1 to --devices")
    return tuple(map(int, texts))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
