"""Evaluates a policy on suites of tasks in the simulator.

    python -m experiments.evaluate --policy=RUN/improve --suite=libero_10 --tasks=5,6
    python -m experiments.evaluate --policy=ws://127.0.0.1:8000 --suite=libero_spatial,libero_10
    python -m experiments.evaluate --policy=RUN/sft --suite=libero_10_swap --against=libero_10
    python -m experiments.evaluate --policy=PATH/pi05_libero --suite=libero_10 \\
        --tokenizer=PATH/paligemma_tokenizer.model
    python -m experiments.evaluate --list

A policy is the folder of a stage (RUN/sft, RUN/improve), a checkpoint of openpi (a step's folder
with `params` and `assets`), or the address of a server that speaks openpi's protocol. A suite is
one that --list prints: LIBERO's, LIBERO-PRO's perturbations of them (_swap: positions, _object:
other looks, _lan: other words, _task: another goal), or with --suite_files a folder of BDDL files
and initial states.

The table and WORKDIR/results.json, which holds every episode, have 95 % intervals (Wilson's; of a
drop, Newcombe's). A stopped evaluation is continued by the same command, and more --episodes are
added to those that there are. More: docs/evaluation.md.
"""

import argparse
import contextlib
import hashlib
import sys
from pathlib import Path

SERVER_SCHEMES = ("ws://", "wss://")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    # After the flags, so that --help is instant.
    from mbpo_jax.envs.workers.pool import WorkerError
    from mbpo_jax.stages.workspace import StageError
    from mbpo_jax.training.interruption import interruptible

    try:
        if options.list:
            print(_listing())
            return 0
        if not options.policy:
            raise ValueError("--policy is missing: a folder, or ws://HOST:PORT of a server")
        workdir = options.workdir or _workdir(options.policy)
        goes_on = f"Finished episodes are kept; the same command continues in {workdir}"
        with interruptible(f"stopped by SIGTERM. {goes_on}"):
            print(_evaluate(options, workdir))
    except (StageError, WorkerError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, (WorkerError, ConnectionError)):
            print(goes_on, file=sys.stderr)
        return 1
    print(f"every episode is in {workdir / 'results.json'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--policy", help="a stage's folder, an openpi checkpoint, or ws://HOST:PORT")
    add("--suite", default="", help="suites, comma-separated")
    add(
        "--suite_files",
        action="append",
        default=[],
        metavar="DIR",
        help="a suite by its files: DIR/*.bddl with initial states beside them, or DIR/bddl_files "
        "and DIR/init_files; can be repeated",
    )
    add("--tasks", default="", help="numbers, comma-separated; by default all of each suite")
    add("--episodes", type=int, default=50, help="per task (default 50)")
    starts = parser.add_mutually_exclusive_group()
    starts.add_argument(
        "--init_states",
        action="store_true",
        help="start from the shipped initial states, the first of each task (default)",
    )
    starts.add_argument(
        "--resets", action="store_true", help="start from random resets that nothing else uses"
    )
    add(
        "--against",
        help="a suite that success is compared with, whose tasks are run too; a perturbed suite is "
        "compared with its own anyway where both are in --suite",
    )
    add(
        "--until_end",
        action="store_true",
        help="episodes go on to their last step, and success is being done then",
    )
    add("--max_steps", type=int, default=0, help="of an episode; by default as openpi's evaluation")
    add("--videos", type=int, default=0, help="GIFs of so many episodes of each task")
    add("--workdir", type=Path, help="by default POLICY/suites, or runs/suites_HOST_PORT")
    add("--workers", type=int, default=2, help="simulator processes, 2.5 GB each (default 2)")
    add("--worker_backend", default="local", help="local, or ray: on the hosts of a cluster")
    add(
        "--replan_steps",
        type=int,
        help="steps of a chunk that are executed; by default all, and 5 "
        "where a server does not say",
    )
    add(
        "--image_size",
        type=int,
        help="pixels; by default the policy's, and 224 where a server does not say",
    )
    add("--variant", default="paper", help="of configs/libero_long.py: an openpi checkpoint's size")
    add("--tokenizer", default="", help="PaliGemma's SentencePiece file, for an openpi checkpoint")
    add("--seed", type=int, default=0, help="of an openpi checkpoint's noise")
    add("--api_key_file", type=Path, help="file with the key that a server asks for")
    add("--patience", type=float, default=60.0, help="seconds that a lost server is waited for")
    add("--list", action="store_true", help="print the suites and their tasks, and stop")
    return parser


def _evaluate(options: argparse.Namespace, workdir: Path) -> str:
    import ml_collections

    from mbpo_jax.reporting.suite_table import suite_table
    from mbpo_jax.serving.acting import check_robot, pool_act, senses
    from mbpo_jax.stages.evaluate_suites import evaluate_suites

    for name, least in (("episodes", 1), ("workers", 1), ("videos", 0), ("max_steps", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}: {least} or more")
    wanted = _wanted(options)
    config = ml_collections.ConfigDict(
        {
            "policy": _identity(options.policy),
            "max_steps": options.max_steps,
            "until_end": options.until_end,
            "videos": options.videos,
            "seed": options.seed,
            "robot": {"control_hz": 20.0},  # every suite's
            "workers": options.workers,
            "worker_backend": options.worker_backend,
            "evaluation": {
                "episodes_per_task": 0 if options.resets else options.episodes,
                "resets_per_task": options.episodes if options.resets else 0,
            },
        }
    )
    with _policy(options) as policy:
        for suite in wanted:
            check_robot(policy.metadata, suite)
        wants = senses(policy.metadata, options.replan_steps, options.image_size)
        config.cameras, config.chunk = tuple(wants.image_keys), wants.steps
        config.image_size = wants.image_size

        def actor_of(suite, tasks):
            return pool_act(policy, wants, suite, tasks)

        return suite_table(evaluate_suites(workdir, config, wanted, actor_of, options.against))


def _wanted(options: argparse.Namespace) -> dict[str, list[int]]:
    """Suite -> tasks, all of which exist."""
    from mbpo_jax.envs import suites

    names = [name.strip() for name in options.suite.split(",") if name.strip()]
    names += [str(Path(folder).absolute()) for folder in options.suite_files]
    if not names:
        raise ValueError("no suite: name one with --suite (--list prints them) or --suite_files")
    texts = [text.strip() for text in options.tasks.split(",") if text.strip()]
    if not all(text.isdigit() for text in texts):
        raise ValueError(f"--tasks are numbers, such as 0,3, not {options.tasks}")
    wanted = {}
    for suite in [*names, *filter(None, [options.against])]:
        tasks = sorted({int(text) for text in texts}) or [*range(suites.num_tasks(suite))]
        for task in tasks if suite in names else [0]:
            suites.task_info(suite, task)
        if suite in names:
            wanted[suite] = tasks
    return wanted


@contextlib.contextmanager
def _policy(options: argparse.Namespace):
    if options.policy.startswith(SERVER_SCHEMES):
        from mbpo_jax.serving.client import RemotePolicy

        key = options.api_key_file.read_text().strip() if options.api_key_file else None
        with RemotePolicy(options.policy, options.workers, key, options.patience) as policy:
            yield policy
        return
    from mbpo_jax.serving import inference

    folder = Path(options.policy)
    if not (folder / "params").is_dir():
        yield inference.load(folder, [options.workers])
        return
    from configs import libero_long

    if not options.tokenizer:
        raise ValueError("an openpi checkpoint needs --tokenizer=PATH/paligemma_tokenizer.model")
    config = libero_long.get_config(options.variant)
    config.pretrained.policy_tokenizer = options.tokenizer
    config.seed = options.seed
    yield inference.load_openpi(folder, config, [options.workers])


def _identity(policy: str) -> str:
    """What a working directory remembers of a policy: a server's address, or the name of a folder
    with a hash of the names and sizes of its parameters' files, which no two trainings share."""
    if policy.startswith(SERVER_SCHEMES):
        return policy
    folder = Path(policy).absolute()
    paths = sorted(path for kind in ("policy", "params") for path in (folder / kind).rglob("*"))
    listing = [(str(p.relative_to(folder)), p.stat().st_size) for p in paths if p.is_file()]
    return f"{folder.name} {hashlib.sha256(repr(listing).encode()).hexdigest()[:12]}"


def _workdir(policy: str) -> Path:
    if policy.startswith(SERVER_SCHEMES):
        name = "".join(x if x.isalnum() else "_" for x in policy.partition("://")[2])
        return Path("runs") / f"suites_{name}"
    return Path(policy) / "suites"


def _listing() -> str:
    from mbpo_jax.envs import suites

    lines, incomplete = [], []
    for suite in suites.all_suites():
        try:
            tasks = [suites.task_info(suite, i) for i in range(suites.num_tasks(suite))]
        except ValueError:  # evaluating one says which files it lacks
            incomplete.append(suite)
            continue
        lines.append(suite)
        lines += [
            f"  {i:2d}  {task.num_init_states:2d} init states  {task.instruction}"
            for i, task in enumerate(tasks)
        ]
    if incomplete:
        lines.append(f"Named, but without all of their files: {', '.join(incomplete)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
