"""Times this package beside its peers on the same work, in one run, and prints ratios.

python -m experiments.benchmark --target=policy --openpi=DIR/bin/python
python -m experiments.benchmark --target=world_model
python -m experiments.benchmark --target=server
python -m experiments.benchmark --target=imagination
python -m experiments.benchmark --target=data
python -m experiments.benchmark --target=rendering
python -m experiments.benchmark --target=gpu --out=DIR

Rounds of both sides alternate, so that a busy machine slows both; a ratio is the median over the
rounds with its 95 % bootstrap interval, below 1 where this package is faster.
The policy server has no peer: its latency is printed under several clients at once. After the
times of imagination comes what its steps cost a device on 1 to 8 devices, from compiled programs
(`python -m experiments.plan --weak_scaling=1,2,4,8`).

`--target=gpu` has no peer: it times the released sizes (π0.5, BAGEL, `small`) on one accelerator,
with random parameters, in one call of --minutes. It needs jax, flax, optax, orbax-checkpoint and
chex alone, and appends every result to DIR/gpu.json at once.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax

from experiments.arguments import number, numbers

VARIANTS = ("tiny", "micro", "mini", "small", "paper")
SIZES = {  # of each target: those there are, and the default
    "policy": (("tiny", "small", "pi05"), "tiny,small"),
    "world_model": (("tiny", "small", "bagel"), "tiny,small"),
    "server": (("tiny", "small", "pi05"), "tiny,small"),
    "imagination": (VARIANTS, "micro"),
    "data": (VARIANTS, "micro"),
    "rendering": (("64", "128", "224", "256"), "64,128"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=(*SIZES, "gpu"), required=True)
    parser.add_argument(
        "--sizes",
        help="comma-separated; "
        + "; ".join(f"{target}: {', '.join(sizes)}" for target, (sizes, _) in SIZES.items()),
    )
    parser.add_argument(
        "--repeats",
        type=number(int, 1),
        default=20,
        help="rounds that count; server: tens of requests",
    )
    parser.add_argument(
        "--sample_batch", type=number(int, 1), default=1, help="policy: chunks per call"
    )
    parser.add_argument(
        "--train_batch", type=number(int, 1), default=8, help="policy: chunks per step"
    )
    parser.add_argument("--openpi", help="policy: Python of an environment that has openpi")
    parser.add_argument(
        "--batches", type=numbers(1), default="1,8", help="world_model: batch sizes"
    )
    parser.add_argument(
        "--clients", type=numbers(1, 1000), default="1,4,16", help="server: numbers of clients"
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmark"))
    gpu = parser.add_argument_group("--target=gpu")
    gpu.add_argument("--out", type=Path, help="folder of gpu.json; runs/benchmark by default")
    gpu.add_argument(
        "--size", choices=("full", "tiny"), default="full", help="tiny: the same on a CPU, to try"
    )
    gpu.add_argument(
        "--minutes", type=float, default=8.0, help="a row that does not fit is skipped and named"
    )
    gpu.add_argument("--rows", default="", help="comma-separated; by default all")
    gpu.add_argument(
        "--profile", default="", metavar="ROW", help="trace this row too; print what takes longest"
    )
    options = parser.parse_args(arguments)
    if options.target == "gpu":
        return _gpu(options, parser)
    known, default = SIZES[options.target]
    sizes = (options.sizes or default).split(",")
    if unknown := set(sizes) - set(known):
        parser.error(f"--sizes: {sorted(unknown)} not among {sorted(known)}")
    if options.openpi and not shutil.which(options.openpi):
        parser.error(f"--openpi: {options.openpi} is no program")
    with_sockets = options.target in ("server", "imagination")
    if with_sockets and importlib.util.find_spec("websockets") is None:
        parser.error(f"--target={options.target} needs: pip install -e '.[serve]'")
    target = importlib.import_module(f"experiments.benchmarks.{options.target}")
    if options.target == "policy" and not options.openpi:
        print(target.MISSING, file=sys.stderr)
    try:
        options.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--workdir: {error}")
    rows = []
    for size in sizes:
        if options.target == "policy":
            batches = {"sample": options.sample_batch, "train": options.train_batch}
            rows += target.run(size, batches, options.repeats, options.openpi)
        elif options.target == "world_model":
            rows += target.run(size, options.batches, options.repeats)
        elif options.target == "server":
            rows += target.run(size, options.clients, 10 * options.repeats)
        elif options.target == "rendering":
            rows += target.run(size, options.repeats)
        else:
            from configs import libero_long

            config = libero_long.get_config(size)
            rows += target.run(config, size, options.repeats)
    _print_latency(rows) if options.target == "server" else _print(rows)
    path = options.workdir / f"{options.target}.json"
    device = jax.devices()[0].device_kind
    report = {"device": device, "machine": platform.machine(), "jax": jax.__version__}
    path.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    print(f"{device}; written to {path}")
    if options.target == "imagination":
        _print_weak_scaling(sizes)
    return 0


def _gpu(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from experiments.benchmarks import gpu

    rows = [name for name in options.rows.split(",") if name]
    out = options.out or options.workdir
    try:
        failed = gpu.run(options.size, out, options.minutes, rows, options.profile)
    except ValueError as error:
        parser.error(str(error))
    return 1 if failed else 0


def _print(rows: list[dict]) -> None:
    print(f"{'work':46}{'ms':>10}{'GFLOP/s':>10}{'of peak':>9}{'peer ms':>10}  ratio (95 %)")
    for row in rows:
        line = f"{row['size']} {row['work']} batch {row['batch']}".ljust(46)
        line += f"{1e3 * row['seconds']:10.2f}"
        if "flops" in row:
            line += f"{row['flops_per_second'] / 1e9:10.1f}{row['share_of_peak']:9.1%}"
        else:
            line += 19 * " "
        if "ratio" in row:
            line += f"{1e3 * row['peer_seconds']:10.2f}"
            line += f"  {row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
        if "chunks_per_second" in row:
            line += f", {row['chunks_per_second']:.1f} chunks/s"
            line += f" (peer {row['peer_chunks_per_second']:.1f})"
        if "episodes_per_second" in row:
            line += f"{row['episodes_per_second']:10.1f} episodes/s"
        if "frames_per_second" in row:
            line += f", {row['frames_per_second']:.0f} frames/s"
            if "psnr" in row:
                line += (
                    f", off by {row['mean_difference']:.2f} (mean), {row['max_difference']} (max)"
                )
                line += f" grey levels, {row['psnr']:.1f} dB"
            elif "ratio" in row:
                line += ", the device starves" if row["ratio"] > 1 else ", the device is fed"
        if "share" in row:
            line += f"  {row['share']:.0%} of its parts"
        if "rms_change" in row:
            line += f", images move by {row['rms_change']:.1f} grey levels"
        print(line)


def _print_weak_scaling(sizes: list[str]) -> None:
    """In processes of their own, which have eight virtual devices."""
    for size in sizes:
        command = [sys.executable, "-m", "experiments.plan", "--weak_scaling=1,2,4,8"]
        config = Path(__file__).parents[1] / "configs" / "libero_long.py"
        subprocess.run([*command, f"--config={config}:{size}"], check=True)


def _print_latency(rows: list[dict]) -> None:
    print(f"{'size':10}{'clients':>8}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'chunks/s':>10}")
    for row in rows:
        quantiles = "".join(f"{1e3 * row[q]:10.1f}" for q in ("p50", "p95", "p99"))
        print(f"{row['size']:10}{row['clients']:8}{quantiles}{row['per_second']:10.1f}")


if __name__ == "__main__":
    sys.exit(main())
