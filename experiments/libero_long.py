"""VLA-MBPO end to end on LIBERO-Long.

Demonstrations, supervised fine-tuning, rollouts, world model, policy optimisation in imagination,
evaluation in the simulator, report.

    python -m experiments.libero_long
    python -m experiments.libero_long --config=configs/libero_long.py:small --workdir=DIR
    python -m experiments.libero_long --config.rl.branch_chunks=1 --workdir=DIR
    python -m experiments.libero_long --stages=demonstrations,sft

Started again in the same working directory, a run continues where it stopped; finished stages are
skipped. The variant `micro` (the default) takes about an hour on two CPU cores.
"""

import contextlib
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG_DIRECTORY = Path(__file__).resolve().parent.parent / "configs"


def run_suite(name: str, default_stages: tuple[str, ...] = ()) -> None:
    """The command line of one suite: flags --config, --workdir and --stages (by default all but
    `fidelity`, or `default_stages`)."""
    with one_message():
        config_flag = config_flags.DEFINE_config_file(
            "config",
            str(CONFIG_DIRECTORY / f"{name}.py:micro"),
            f"configs/{name}.py:VARIANT (tiny, micro, mini, small or paper). Any entry can be "
            "overridden: --config.rl.branch_chunks=1",
        )
        workdir = flags.DEFINE_string(
            "workdir", None, "where everything is written; runs/CONFIG_VARIANT by default"
        )
        stages = flags.DEFINE_list(
            "stages",
            list(default_stages),
            "comma-separated stages to run: demonstrations, sft, rollouts, world_model, fidelity, "
            "value, selection, siblings, improve, evaluate, report; without a list all but "
            "fidelity, selection and siblings. A robot without a simulator has imagine instead of "
            "evaluate, and none of those three",
        )
        coordinator = flags.DEFINE_string(
            "coordinator", None, "HOST:PORT of process 0 of several; by default from the cluster"
        )
        processes = flags.DEFINE_integer("processes", None, "how many processes there are")
        process = flags.DEFINE_integer("process", None, "index of this process")
        for flag in (config_flag, workdir, stages, coordinator, processes, process):
            # So that --help of every suite shows them, not only that of this module.
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])

    def main(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; flags begin with --")
        logging.set_verbosity(logging.WARNING)  # the checkpoint library tells every save
        from mbpo_jax.training.sharding import start_processes

        with one_message():
            start_processes(coordinator.value, processes.value, process.value)
        from mbpo_jax import pipeline  # after the flags, so that --help is instant

        run_name = _run_name(config_flags.get_config_filename(flags.FLAGS["config"]))
        pipeline.main(config_flag.value, workdir.value or f"runs/{run_name}", stages.value)

    app.run(main, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
    """For `absl.app.run`: what `one_message` promises holds for the flags."""
    with one_message():
        return flags.FLAGS(argv)


@contextlib.contextmanager
def one_message():
    """A wrong entry, value, variant or path on the command line is one message and exit status
    1."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:
        whole = isinstance(error, OSError) or not error.args
        message = str(error if whole else error.args[0]).replace("\\n", "\n")
        if "Traceback" in message:  # of the config file; its last line says what is wrong
            message = message.rpartition("Error: ")[2]
        print(f"error: {message.strip()}", file=sys.stderr)
        sys.exit(1)


def _run_name(config_file: str) -> str:
    file, _, variant = config_file.partition(":")
    return f"{Path(file).stem}_{variant or 'micro'}"


if __name__ == "__main__":
    run_suite("libero_long")
