"""Reward models on the held-out frames of a run (arXiv 2603.20607, table 1): is the task done?

    python -m experiments.reward_models --workdir=RUN
    python -m experiments.reward_models --workdir=RUN --reward_model=umm,separate
    python -m experiments.reward_models --workdir=RUN --reward_model=umm,openai \\
        --url=http://127.0.0.1:8000/v1 --model=Qwen/Qwen3-VL-8B-Instruct

`umm` is the run's own world model, `separate` one that learns nothing but the reward (trained here
first, with the same steps), `openai` any server that speaks the OpenAI chat protocol with images
and log-probabilities, such as vLLM or SGLang (third_party/qwen3_vl). A key for it is read from
OPENAI_API_KEY. Started again, the command continues, and finished answers are not asked for again.
Writes RUN/reward_models/reward_models.json and .html.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.arguments import number

REWARD_MODELS = ("umm", "separate", "openai")
PICTURED_EPISODES = 6


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # After the flags, so that --help is instant.
    from mbpo_jax.stages.workspace import StageError

    try:
        print(_score(options))
    except (StageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"the same command continues in {options.workdir}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reward_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="working directory of a run")
    add("--reward_model", default="umm", help=f"some of {','.join(REWARD_MODELS)} (default umm)")
    add("--url", default="http://127.0.0.1:8000/v1", help="of the server, up to /v1")
    add("--model", default="Qwen/Qwen3-VL-8B-Instruct", help="as the server calls it")
    add("--concurrency", type=number(int, 1), default=8, help="questions at a time (default 8)")
    add("--timeout", type=number(float, 0.1), default=60.0, help="seconds of one (default 60)")
    return parser


def chosen(names: str) -> list[str]:
    """Raises ValueError for a name that is none, with the nearest."""
    found = names.split(",")
    for name in found:
        if name not in REWARD_MODELS:
            near = difflib.get_close_matches(name, REWARD_MODELS, 1, 0.0)[0]
            raise ValueError(
                f"no reward model {name!r}; did you mean {near!r}? There are "
                f"{', '.join(REWARD_MODELS)}"
            )
    return list(dict.fromkeys(found))


def _score(options: argparse.Namespace) -> str:
    import jax

    from experiments.reward_models import chat
    from experiments.reward_models.report import page, row, table
    from mbpo_jax.data.pipelines import reward_examples
    from mbpo_jax.stages.build import load_world_model, observation_builder
    from mbpo_jax.stages.fidelity import separate_reward_params
    from mbpo_jax.stages.finetune_world_model import world_model_episodes
    from mbpo_jax.stages.measure_fidelity import answers
    from mbpo_jax.stages.workspace import StageError, Workspace, read_config

    names = chosen(options.reward_model)
    config = read_config(options.workdir)
    workspace = Workspace(options.workdir, config)
    workspace.require("world_model")
    train, held_out = world_model_episodes(workspace)
    builder = observation_builder(config)
    index = reward_examples(held_out, builder).index
    if not len(index):
        raise StageError(f"{options.workdir} holds out no labelled frames")
    directory = options.workdir / "reward_models"
    directory.mkdir(exist_ok=True)

    def asked():
        server = chat.Server(
            options.url, options.model, os.environ.get("OPENAI_API_KEY", ""), options.timeout
        )
        moments = [
            (held_out[e].instruction, [held_out[e].images[c][f] for c in config.cameras])
            for e, f, _ in index
        ]
        return chat.ask_all(server, moments, directory / "openai.jsonl", options.concurrency)

    found: dict[str, np.ndarray] = {}
    with jax.default_matmul_precision(config.get("matmul_precision") or None):
        for name in names:
            if name == "openai":
                found[name] = asked()
                continue
            world, params = load_world_model(config, options.workdir)
            if name == "separate":
                params = separate_reward_params(
                    config, world, params, train, directory / "separate"
                )
            found[name], _, _ = answers(world, params, held_out, builder)
    rows = {name: row(probability, index) for name, probability in found.items()}
    (directory / "reward_models.json").write_text(json.dumps(rows, indent=1))
    pictures = _over_time(found, index, held_out)
    path = directory / "reward_models.html"
    path.write_text(page(config.suite, rows, pictures))
    return f"{table(rows)}\n{path}"


def _over_time(found: Mapping[str, np.ndarray], index: np.ndarray, episodes: list) -> list[dict]:
    """Of some held-out episodes, half of them successes where there are: "steps" and "label" of the
    labelled frames, and what each model says, "models": name -> P(Yes)."""
    numbers = np.unique(index[:, 0])
    solved = np.array([bool(episodes[e].success) for e in numbers])
    half = PICTURED_EPISODES // 2
    some = [*numbers[solved][:half], *numbers[~solved][:half]]
    pictures = []
    for e in some:
        rows = np.flatnonzero(index[:, 0] == e)
        pictures.append(
            {
                "episode": int(e),
                "steps": [int(episodes[e].timesteps[f]) for f in index[rows, 1]],
                "label": index[rows, 2].tolist(),
                "models": {name: p[rows].tolist() for name, p in found.items()},
            }
        )
    return pictures


if __name__ == "__main__":
    sys.exit(main())
