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
"""

import functools
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
        "success, reward); can be repeated, and several keys of one field are concatenated",
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
    flags.mark_flags_as_required(["format", "source", "workdir"])
    return config


def main(config, options) -> str:
    """Imports, or surveys with --dry_run; returns what to print at the end.

    Raises:
        StageError: for anything the user can mend.
    """
    from mbpo_jax import pipeline  # after the flags, so that --help is instant
    from mbpo_jax.stages.import_demonstrations import Import, import_demonstrations, survey
    from mbpo_jax.stages.workspace import StageError, Workspace

    renames = dict(pair.split("=", 1) for pair in options.map)
    source, workdir = Path(options.source).absolute(), Path(options.workdir).absolute()
    stage = options.stage
    successes_only = stage == "demonstrations"
    job = Import(options.format, source, renames, options.skip_bad, successes_only)
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
    except StageError:
        shutil.rmtree(unfinished)
        raise
    shutil.rmtree(unfinished / stage / "spool")
    (unfinished / stage).rename(target)
    shutil.rmtree(unfinished)
    return f"imported into {target}"


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
