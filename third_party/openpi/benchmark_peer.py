"""Runs openpi in its own environment: one timed run of the work for every line on standard input.

Started by `python -m experiments.benchmark --target=policy`; the only argument is the job as JSON.
"""

import json
import os
import sys
import time


def main() -> None:
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print must not look like an answer
    run = _run(job)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, file=answers, flush=True)


def _run(job: dict):
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from openpi.models import model
    from openpi.shared import nnx_utils

    config = _configure(job)
    policy = config.create(jax.random.key(0))
    batch, side = job["batch"], job["vision"]["image_size"]
    rng = np.random.default_rng(0)
    names = model.IMAGE_KEYS
    tokens = rng.integers(1, job["vocab_size"], (batch, config.max_token_len)).astype(np.int32)
    image = (batch, side, side, 3)
    observation = model.Observation(
        images={name: jnp.asarray(rng.uniform(-1, 1, image), jnp.float32) for name in names},
        image_masks={name: jnp.ones(batch, bool) for name in names},
        state=jnp.zeros((batch, config.action_dim)),
        tokenized_prompt=jnp.asarray(tokens),
        tokenized_prompt_mask=jnp.ones(tokens.shape, bool),
    )
    key = jax.random.key(1)
    if job["work"] == "sample":
        sample = nnx_utils.module_jit(policy.sample_actions)
        return lambda: jax.block_until_ready(sample(key, observation, num_steps=job["steps"]))

    actions = jnp.zeros((batch, config.action_horizon, config.action_dim))
    graph, params = nnx.split(policy)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-4, 10, 1000, 5e-6)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-10))

    def train(state, key):
        params, average, opt_state = state

        def loss_fn(params):
            return nnx.merge(graph, params).compute_loss(key, observation, actions).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, b: 0.99 * a + 0.01 * b, average, params)
        return (params, average, opt_state), (loss, optax.global_norm(gradients))

    step = jax.jit(train, donate_argnums=0)
    state = [(params, jax.tree.map(jnp.copy, params), tx.init(params))]

    def advance():
        state[0], metrics = step(state[0], key)
        jax.block_until_ready(metrics)

    return advance


def _configure(job: dict):
    """openpi's configuration, with its constant tables of sizes replaced by the job's."""
    from openpi.models import gemma, model, pi0_config, siglip

    sizes = {
        "gemma_2b": gemma.Config(**job["language"]),
        "gemma_300m": gemma.Config(**job["expert"]),
    }
    gemma.get_config = sizes.__getitem__
    gemma.PALIGEMMA_VOCAB_SIZE = job["vocab_size"]
    vision = job["vision"]
    siglip.decode_variant = lambda variant: {
        "width": vision["width"],
        "depth": vision["depth"],
        "mlp_dim": vision["mlp_dim"],
        "num_heads": vision["num_heads"],
        "patch_size": (vision["patch_size"], vision["patch_size"]),
    }
    resolution = (vision["image_size"], vision["image_size"])
    model.IMAGE_RESOLUTION = resolution
    model.preprocess_observation.__kwdefaults__["image_resolution"] = resolution
    return pi0_config.Pi0Config(
        dtype=job["dtype"],
        pi05=job["pi05"],
        discrete_state_input=False,
        action_dim=job["action_dim"],
        action_horizon=job["chunk"],
        max_token_len=job["max_prompt_tokens"],
    )


if __name__ == "__main__":
    main()
