"""What a frame costs beside one of all of the scene in full meshes, and how far the two differ."""

import itertools
import time

import numpy as np
from tqdm import tqdm

from experiments.benchmarks.timing import interleave, measured
from mbpo_jax.envs import suites
from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim.libero import LiberoEnv

TASKS = (("libero_10", 5), ("libero_goal", 8), ("libero_spatial", 0))
STATES = 10  # of a round: it takes a second to go from one way of drawing to the other


def run(size: str, repeats: int) -> list[dict]:
    """A row for each of TASKS: both views at `size` pixels, in `repeats` rounds and one more of
    STATES states, from an episode of the scripted expert. "ours" draws what a camera sees (with
    less detail, if frames are small), "peer" everything in full. "seconds" are of one state.

    "mean_difference" and "max_difference" are in grey levels, "psnr" in dB (infinite for equal
    frames), all over the frames of the row. The ratio of `frames_per_second` is 1 / "ratio".
    """
    return [_task(suite, task_id, int(size), repeats) for suite, task_id in TASKS]


def _task(suite: str, task_id: int, size: int, repeats: int) -> dict:
    env = LiberoEnv(suite, task_id, image_size=size)
    states = _states(env, STATES * (repeats + 1))
    drawn = {"ours": [], "peer": []}

    def drawing(name: str):
        def draw() -> float:
            env.culling.enabled = env.detail.enabled = name == "ours"
            begin = len(drawn[name])
            env.render_state(states[begin])  # the renderer is given another level of detail
            started = time.perf_counter()
            for state in states[begin : begin + STATES]:
                drawn[name].append(np.stack([*env.render_state(state).values()]))
            return (time.perf_counter() - started) / STATES

        return draw

    work = f"{suite} task {task_id}, {size} px"
    row = measured(interleave({name: drawing(name) for name in drawn}, repeats, work))
    env.close()
    difference = np.abs(np.subtract(*(np.array(x, np.int16) for x in drawn.values())))
    power = np.mean(np.square(difference, dtype=np.float64))
    views = len(env.cameras)
    return {
        "size": str(size),
        "work": f"{suite} task {task_id}, {views} views",
        "batch": 1,
        **row,
        "frames_per_second": views / row["seconds"],
        "mean_difference": float(difference.mean()),
        "max_difference": int(difference.max()),
        "psnr": float(10 * np.log10(255**2 / power)) if power else float("inf"),
    }


def _states(env: LiberoEnv, count: int) -> list[np.ndarray]:
    env.reset_to(EpisodeRequest(task_id=env.task_id, seed=0, max_steps=300))
    states = [env.state()]
    actions = itertools.islice(suites.expert_actions(env), env.max_steps)
    for action in tqdm(actions, total=env.max_steps, desc=f"{env.suite} task {env.task_id}"):
        env.step(action)
        states.append(env.state())
        if env.over:
            break
    return [states[i] for i in np.linspace(0, len(states) - 1, count).astype(int)]
