"""Writes a page to look at one recorded episode, or at what the improved policy imagines.

    python -m experiments.view --episode=rollouts:3
    python -m experiments.view --branch=rollouts:3:40 --chunks=4

The first shows episode 3 of the stage `rollouts` (or `demonstrations`): every view with the frame
that the world model expected there, the actions, P(done) and values. The second starts at the frame
of step 40 and shows what the policy and the world model imagine from it. One HTML file, without
network; `page.html#12` opens it at frame 12. --rerun=FILE.rrd writes a recording for Rerun too.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from experiments.arguments import number

NEEDED = ("cameras", "chunk", "seed")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--episode", metavar="STAGE:NUMBER")
    what.add_argument("--branch", metavar="STAGE:NUMBER:STEP")
    parser.add_argument("--workdir", type=Path, default=Path("runs/libero_long_micro"))
    parser.add_argument(
        "--chunks", type=number(int, 1, 10_000), help="of a branch; by default rl.branch_chunks"
    )
    parser.add_argument("--output", type=Path, help="by default WORKDIR/view/NAME.html")
    parser.add_argument("--rerun", type=Path, metavar="FILE.rrd", help="needs rerun-sdk")
    options = parser.parse_args(arguments)
    if options.rerun and importlib.util.find_spec("rerun") is None:
        parser.error("--rerun needs the package rerun-sdk: `pip install -e '.[view]'`")
    chosen = (options.episode or options.branch).split(":")
    if len(chosen) != (2 if options.episode else 3) or not all(n.isdigit() for n in chosen[1:]):
        parser.error("--episode is STAGE:NUMBER, --branch is STAGE:NUMBER:STEP")
    from mbpo_jax.reporting.view import (  # after the flags, so that --help is instant
        branch_clip,
        episode_clip,
        render_clip,
        write_rerun,
    )
    from mbpo_jax.stages.workspace import StageError, Workspace, read_config

    stage, numbers = chosen[0], [int(n) for n in chosen[1:]]
    try:
        workspace = Workspace(options.workdir, read_config(options.workdir, NEEDED))
        if options.episode:
            clip = episode_clip(workspace, stage, *numbers)
        else:
            workspace.require("improve")
            chunks = options.chunks or workspace.config.rl.branch_chunks
            clip = branch_clip(workspace, stage, *numbers, chunks)
        kind = "episode" if options.episode else "branch"
        path = options.output or options.workdir / "view" / f"{kind}_{'_'.join(chosen)}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render_clip(clip), encoding="utf-8")
        print(f"written to {path}")
        if options.rerun:
            write_rerun(clip, options.rerun)
            print(f"written to {options.rerun}")
    except (StageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
