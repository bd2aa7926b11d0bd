"""Does a run that is killed at any moment end as if nothing had happened?

Runs the pipeline once undisturbed, then every stage again while it is killed --kills times at
random moments (every fifth signal is a SIGTERM, the others are SIGKILL), and compares: parameters
and metrics bit for bit, datasets and evaluations episode by episode. Exit status 1 on any
difference.

    python -m experiments.soak
    python -m experiments.soak --stages=sft,improve --kills=5
    python -m experiments.soak --config.sft.steps=1000

What the runs print is in WORKDIR/soak.log.
"""

import contextlib
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from configs import soak as soak_config
from experiments.libero_long import one_message, parse_flags

# Fresh processes that need not import the libraries again.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mbpo_jax.pipeline"])

with one_message():
    _CONFIG = config_flags.DEFINE_config_file(
        "config",
        soak_config.__file__,
        "Any entry can be overridden: --config.sft.steps=1000",
        lock_config=True,
    )
_KILLS = flags.DEFINE_integer("kills", 20, "Signals sent to each stage.", lower_bound=1)
_STAGES = flags.DEFINE_list(
    "stages", [], "Stages to disturb; all that the pipeline runs by default."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random moments.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Kept afterwards; a temporary one by default.")


def run_stage(config, workdir: Path, stage: str, log: Path) -> None:
    """The command line's run of one stage, in this process. Programs that an earlier one compiled
    are not compiled again: most of such a short run would be that."""
    import jax

    from mbpo_jax import pipeline

    jax.config.update("jax_compilation_cache_dir", str(log.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    logging.set_verbosity(logging.WARNING)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        pipeline.main(config, str(workdir), [stage])


class Soak:
    """The undisturbed run in `workdir/whole` and the disturbed one in `workdir/killed`."""

    def __init__(self, config, workdir: Path, seed: int):
        self.config, self.whole, self.killed = config, workdir / "whole", workdir / "killed"
        self.log = workdir / "soak.log"
        self.moments = random.Random(seed)

    def start(self, workdir: Path, stage: str):
        process = PROCESSES.Process(target=run_stage, args=(self.config, workdir, stage, self.log))
        process.start()
        return process

    def finish(self, process, stage: str) -> None:
        process.join()
        if process.exitcode != 0:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            sys.exit(f"error: {stage} ended with status {process.exitcode}:\n{tail}")

    def undisturbed(self, stage: str) -> float:
        """Runs a stage to its end unless that was done before; returns the seconds it took."""
        self.finish(self.start(self.whole, stage), stage)
        return 60 * json.loads((self.whole / stage / "done.json").read_text())["minutes"]

    def disturbed(self, stage: str, seconds: float, kills: int) -> dict:
        """Runs a stage under `kills` signals within its `seconds`, then to the end."""
        shutil.rmtree(self.killed, ignore_errors=True)
        shutil.copytree(
            self.whole,
            self.killed,
            ignore=lambda folder, _: [stage] if Path(folder) == self.whole else [],
        )
        directory = self.killed / stage
        counts = {"kill": 0, "term": 0, "during a save": 0, "whole runs": 0}
        differing: set[str] = set()
        bar = tqdm(total=kills, desc=stage, unit="signal")
        while True:
            process, started = self.start(self.killed, stage), time.monotonic()
            if bar.n < kills:
                process.join(self.moments.uniform(0.0, seconds))
            if bar.n == kills or process.exitcode is not None:
                self.finish(process, stage)
                counts["whole runs"] += 1
                differing |= set(differences(self.whole / stage, directory))
                if bar.n == kills:
                    bar.close()
                    return {**counts, "seconds": seconds, "differing": sorted(differing)}
                seconds = time.monotonic() - started  # nothing to compile any more
                shutil.rmtree(directory)
                continue
            bar.update()
            if bar.n % 5 == 0:
                process.terminate()
                process.join()
                # Before the program listens a SIGTERM ends it as any other.
                if process.exitcode != -signal.SIGTERM:
                    self.finish(process, stage)
                counts["term"] += 1
            else:
                process.kill()
                process.join()
                counts["kill"] += 1
                unfinished = [*directory.rglob("*-tmp"), *directory.rglob("*.tmp")]
                counts["during a save"] += bool(unfinished)


def differences(expected: Path, found: Path) -> list[str]:
    """Names of the results of a stage that differ in two folders."""
    differing = []
    for name, read in RESULTS.items():
        for path in sorted(p.relative_to(expected) for p in expected.rglob(name)):
            if "checkpoints" in path.parts:  # which steps were saved last depends on the signals
                continue
            if not (found / path).exists() or read(expected / path) != read(found / path):
                differing.append(str(path))
    return differing


def _parameters(path: Path) -> list[tuple]:
    import jax
    from orbax.checkpoint import StandardCheckpointer

    with StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path.parent.absolute())
    return [
        (jax.tree_util.keystr(key), x.shape, np.asarray(x).tobytes())
        for key, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _episodes(path: Path) -> list[tuple]:
    from mbpo_jax.data.episodes import read_episodes

    return [
        (e.task_id, e.seed, e.success, e.length, e.actions.tobytes(), e.proprio.tobytes())
        + tuple(images.tobytes() for images in e.images.values())
        for e in read_episodes(path.parent)
    ]


def _evaluation(path: Path) -> list[dict]:
    from mbpo_jax.training.metrics import read_metrics

    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(path)]
    return sorted(rows, key=lambda row: (row["task"], row["init_state"]))


RESULTS = {
    "_METADATA": _parameters,
    "dataset_info.json": _episodes,
    "metrics.jsonl": lambda path: path.read_text(),
    "episodes_*.jsonl": _evaluation,
}


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; flags begin with --")
    logging.set_verbosity(logging.WARNING)
    from mbpo_jax.pipeline import STAGES
    from mbpo_jax.stages.limits import check_config

    known = [name for name, stage in STAGES.items() if not stage.on_request]
    chosen = _STAGES.value or known
    if unknown := sorted(set(chosen) - set(known)):
        raise app.UsageError(f"there are no stages {unknown}; choose among {known}")
    with contextlib.ExitStack() as stack:
        workdir = _WORKDIR.value or stack.enter_context(tempfile.TemporaryDirectory())
        with one_message():
            check_config(_CONFIG.value)
            Path(workdir).mkdir(parents=True, exist_ok=True)
        soak = Soak(_CONFIG.value, Path(workdir).absolute(), _SEED.value)
        soak.whole.mkdir(parents=True, exist_ok=True)
        rows = {}
        for stage in known[: 1 + max(known.index(name) for name in chosen)]:
            print(f"[{stage}] undisturbed", flush=True)
            seconds = soak.undisturbed(stage)
            if stage in chosen:
                rows[stage] = soak.disturbed(stage, seconds, _KILLS.value)
    print(
        f"\n{'stage':16}{'seconds':>8}{'SIGKILL':>9}{'SIGTERM':>9}{'in a save':>11}{'result':>10}"
    )
    for stage, row in rows.items():
        result = ", ".join(row["differing"]) or "identical"
        counts = f"{row['kill']:9}{row['term']:9}{row['during a save']:11}"
        print(f"{stage:16}{row['seconds']:8.0f}{counts}  {result}")
    if any(row["differing"] for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
