"""Imports demonstrations, so that a run starts from them instead of the scripted expert's; or a
policy's rollouts, successes and failures, with --stage=rollouts.

    python -m experiments.import_data --format=libero_hdf5 --source=PATH --workdir=DIR
    python -m experiments.import_data --format=rlds --source=PATH --workdir=DIR --dry_run
    python -m experiments.import_data --format=lerobot --source=PATH --workdir=DIR \\
        --map=observation.images.top=agentview --map=observation.images.hand=robot0_eye_in_hand
    python -m experiments.libero_long --workdir=DIR

The config is that of the run (--config and its entries, as in experiments.libero_long): it says
which tasks, cameras, image size and chunk length are wanted. Started again after a stop, an import
continues; it appears in the working directory when it is complete. An import with bad episodes
lists all their problems and leaves nothing behind.

Every episode is checked against the config's robot (limits, number and order of actions and states,
control rate, cameras); an instruction above a token budget is a warning here and an error of the
stage that would read it. An episode is a success if its label is 1 at any
step: the field `success`, or `reward` where there is no `success` (`dones` where an HDF5 file has
no `rewards`), made of zeros and ones; without a label it counts as a success.
"""

import functools
import math
import shutil
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.libero_long import CONFIG_DIRECTORY, one_message, parse_flags


def define_flags() -> flags.FlagHolder:
    """Defines the command line; returns the config's flag."""
    config = config_flags.DEFINE_config_file(
        "config",
        str(CONFIG_DIRECTORY / "libero_long.py:micro"),
        "configs/NAME.py:VARIANT of the run; any entry can be overridden: --config.tasks='(0, 1)'",
    )
    flags.DEFINE_enum("format", None, ["libero_hdf5", "rlds", "lerobot"], "format of the source")
    flags.DEFINE_string("source", None, "the dataset: a folder, or a file of libero_hdf5 or rlds")
    flags.DEFINE_enum(
        "stage", "demonstrations", ["demonstrations", "rollouts"], "what the episodes are"
    )
    flags.DEFINE_string("workdir", None, "the run's working directory")
    flags.DEFINE_multi_string(
        "map",
        [],
        "KEY=NAME: the source's KEY is the camera or field NAME (actions, proprio, instruction, "
        "success, reward, target_actions, drawn); can be repeated, and several keys of actions or "
        "proprio are concatenated",
    )
    flags.DEFINE_string(
        "instruction", None, "the instruction of every episode, instead of the source's"
    )
    flags.DEFINE_bool(
        "all_successes", False, "take every episode as a success, whatever labels there are"
    )
    flags.DEFINE_enum(
        "orientation",
        None,
        ["as_stored", "rotated", "flipped", "mirrored"],
        "how frames are turned: by 180 degrees (rotated, the default of libero_hdf5, whose frames "
        "are upside down), upside down alone (flipped), left to right alone (mirrored), or not at "
        "all (the default of the other formats)",
    )
    flags.DEFINE_multi_string(
        "range",
        [],
        "NAME=LOW:HIGH: LOW and HIGH in the source are the limits of the robot's action dimension "
        "NAME, onto which it is mapped; can be repeated",
    )
    flags.DEFINE_bool("skip_bad", False, "leave bad episodes out instead of refusing the import")
    flags.DEFINE_bool(
        "dry_run", False, "check everything, print a summary and draw first frames; import nothing"
    )
    flags.register_validator(
        "map",
        lambda pairs: all("=" in pair for pair in pairs),
        "a rename is KEY=NAME",
    )
    flags.register_validator(
        "map",
        lambda pairs: len({_split(pair)[0] for pair in pairs}) == len(pairs),
        "a KEY is renamed twice",
    )
    flags.register_validator(
        "instruction",
        lambda text: text is None or bool(text.strip()),
        "an instruction has at least a word",
    )
    flags.mark_flags_as_required(["format", "source", "workdir"])
    return config


def main(config, options) -> str:
    """Imports, or surveys with --dry_run; returns what to print at the end.

    Raises:
        StageError: for anything the user can mend.
    """
    from mbpo_jax import pipeline  # after the flags, so that --help is instant
    from mbpo_jax.stages.import_demonstrations import import_demonstrations
    from mbpo_jax.stages.import_source import Import
    from mbpo_jax.stages.limits import check_config
    from mbpo_jax.stages.read_source import survey
    from mbpo_jax.stages.workspace import StageError, Workspace

    check_config(config)
    given = {}
    if options.instruction is not None:
        given["instruction"] = options.instruction.strip()
    if options.all_successes:
        given["success"] = True
    source, workdir = Path(options.source).absolute(), Path(options.workdir).absolute()
    stage = options.stage
    job = Import(
        options.format,
        source,
        dict(_split(pair) for pair in options.map),
        options.skip_bad,
        successes_only=stage == "demonstrations",
        given=given,
        ranges=tuple(_parse_range(text) for text in options.range),
        orientation=options.orientation or "",
    )
    if options.dry_run:
        return survey(config, job, workdir)
    target = workdir / stage
    if target.exists():
        raise StageError(f"{target} exists: delete it, or choose another --workdir")
    job.entries(config)  # a source of another format is refused before anything is written
    unfinished = workdir / f".import-{job.fingerprint(config)}"
    unfinished.mkdir(parents=True, exist_ok=True)
    work = functools.partial(import_demonstrations, job=job)
    try:
        pipeline.run_stage(Workspace(unfinished, config), stage, work)
    except Exception:  # a stop (KeyboardInterrupt) is none: the same command continues after it
        shutil.rmtree(unfinished)
        raise
    shutil.rmtree(unfinished / stage / "spool")
    (unfinished / stage).rename(target)
    shutil.rmtree(unfinished)
    return f"imported into {target}"


def _split(pair: str) -> tuple[str, str]:
    key, _, name = pair.partition("=")
    return key, name


def _parse_range(text: str) -> tuple[str, float, float]:
    """Raises ValueError for what is not NAME=LOW:HIGH."""
    name, _, values = text.partition("=")
    try:
        low, high = (float(value) for value in values.split(":"))
    except ValueError as error:
        raise ValueError(f"--range={text}: a range is NAME=LOW:HIGH, two numbers") from error
    if low == high or not math.isfinite(low + high):
        raise ValueError(f"--range={text}: LOW and HIGH are two different, finite numbers")
    return name, low, high


if __name__ == "__main__":
    with one_message():
        config_flag = define_flags()

    def run(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; flags begin with --")
        logging.set_verbosity(logging.WARNING)
        from mbpo_jax.stages.workspace import StageError

        try:
            print(main(config_flag.value, flags.FLAGS))
        except (StageError, ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(run, flags_parser=parse_flags)
