"""Rehearses mbpo_jax/mbpo.py in seconds on a world whose answers are known.

    python -m experiments.toy
    python -m experiments.toy --out=DIR --iterations=60 --seed=1

A point on a line must get beyond 1 (mbpo_jax/toy.py). The policy improves on branches that are
imagined by the exact world, by a wrong one, and by the wrong one with the anchor to what it was
fine-tuned on. Prints what each of them promises and what the policy really achieves, and draws
both in OUT/toy.png. Change the rollout, the advantage or the loss in mbpo.py and look again.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import number
from mbpo_jax.mbpo import MBPO, Settings, flattened, imagine
from mbpo_jax.toy import CHUNK, ToyPolicy, ToyWorld, WrongWorld, observation
from mbpo_jax.types import Demonstration, WorldModel

SETTINGS = Settings(
    group_size=8,
    reward_threshold=0.0,
    discount=0.9,
    discount_per="reference",
    clip_ratio=0.2,
    actor_lr=2e-2,
    critic_lr=5e-2,
    weight_decay=0.0,
    critic_warmup=0,
    gradient_accumulation=1,
)
ANCHOR = 30.0
STARTS, UPDATES = 32, 4  # start states of an iteration, updates on its branches
RUNS: dict[str, tuple[WorldModel, float]] = {
    "exact world": (ToyWorld(), 0.0),
    "wrong world": (WrongWorld(), 0.0),
    f"wrong world, anchor {ANCHOR:g}": (WrongWorld(), ANCHOR),
}


def rehearse(world: WorldModel, anchor: float, iterations: int, seed: int) -> dict[str, np.ndarray]:
    """Success in the given world and in the exact one, and the policy's mean action, before each
    iteration: arrays [iterations]."""
    policy, chunks = ToyPolicy(), SETTINGS.branch_chunks
    mbpo = MBPO(policy, Settings(**{**vars(SETTINGS), "anchor_weight": anchor}), CHUNK)
    start = observation(np.repeat(np.linspace(0.4, 0.9, STARTS), SETTINGS.group_size))
    count = len(start.proprio)
    # It was fine-tuned on actions around 0, where the policy starts.
    shown = Demonstration(start, jnp.zeros((count, CHUNK, 1)), jnp.ones(count))

    def branch_in(world, params, key):
        keys = jax.random.split(key, count)
        options = {"chunks": chunks, "reward_threshold": SETTINGS.reward_threshold}
        return imagine(policy, world, params, {}, start, keys, **options)

    def success(branch):
        return 1.0 - jnp.prod(1.0 - branch.done, axis=0).mean()

    def iteration(state, key):
        imagined = branch_in(world, state.params, key)
        seen = {
            "imagined success": success(imagined),
            "real success": success(branch_in(ToyWorld(), state.params, key)),
            "mean action": state.params["actor"]["mean"],
        }
        batch = flattened(mbpo.with_advantages(imagined), normalize=True)
        for _ in range(UPDATES):
            state, _ = mbpo.update(state, batch, shown, key)
        return state, seen

    keys = jax.random.split(jax.random.key(seed), iterations)
    _, history = jax.jit(lambda state: jax.lax.scan(iteration, state, keys))(
        mbpo.init(policy.init())
    )
    return jax.tree.map(np.asarray, history)


def draw(histories: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """What each world promises (dashed) and what is real (solid), over the iterations."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for color, (name, history) in zip(("C0", "C3", "C2"), histories.items(), strict=True):
        axes.plot(history["real success"], color=color, label=f"{name}: real")
        axes.plot(history["imagined success"], "--", color=color, label=f"{name}: imagined")
    axes.set(xlabel="iteration", ylabel="success", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder for results")
    parser.add_argument(
        "--iterations", type=number(int, 1), default=60, help="refills of imagined branches"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out={options.out}: {error.strerror}")
    started, histories = time.monotonic(), {}
    print(f"{'':24} {'imagined':>16} {'real':>16} {'mean action':>12}")
    for name, (world, anchor) in RUNS.items():
        histories[name] = history = rehearse(world, anchor, options.iterations, options.seed)
        found = history["imagined success"], history["real success"]
        ends = [f"{x[0]:6.2f} -> {x[-1]:5.2f}" for x in found]
        print(f"{name:24} {ends[0]:>16} {ends[1]:>16} {history['mean action'][-1]:12.2f}")
    draw(histories, options.out / "toy.png")
    rows = {
        name: {key: np.round(x, 6).tolist() for key, x in history.items()}
        for name, history in histories.items()
    }
    (options.out / "toy.json").write_text(json.dumps(rows))
    print(f"{time.monotonic() - started:.1f} s; picture and numbers in {options.out}")


if __name__ == "__main__":
    main()
