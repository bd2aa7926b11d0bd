"""Times of the world model: a predicted chunk and a reward, beside the same modules run in the
order of the reference server, and the effect of each option."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.flops import matmul_flops
from experiments.benchmarks.timing import interleave, matmul_peak, measured, timed
from mbpo_jax.data.tokenizers import EmbeddedTokenizer
from mbpo_jax.nn import qwen2_mot
from mbpo_jax.types import Observation, Params, Prompt
from mbpo_jax.world_model import bagel, generation, guidance
from mbpo_jax.world_model.config import GuidanceConfig, UMMConfig, variant
from mbpo_jax.world_model.metrics import judge, predictor
from mbpo_jax.world_model.umm_world import UMMWorld

CAMERAS = ("head", "wrist")
CHUNK, ACTION_DIM, PROMPT = 10, 7, 16  # the recorded times are of one arm with a gripper
PAPER_GUIDANCE = GuidanceConfig(text_scale=6.0, image_scale=2.0)
EVALUATIONS = {"latent": 10, "latent_small": 10, "bagel": 49}  # of the network per view


class ReferenceOrder(UMMWorld):
    """The same model computed in the order of the public BAGEL server: one sample at a time, every
    prefix built anew for every view and guidance branch, the branches evaluated one after the
    other, and the reward read from a generated answer."""

    def encode(self, params, observation, key):
        return _one_by_one(functools.partial(super().encode, params), (observation,), key)

    def step(self, params, state, actions, key):
        return _one_by_one(functools.partial(super().step, params), (state, actions), key)

    def view_tokens(self, params, segments, contexts, noise):
        config, side = self.config, self.config.latent_side
        keep = segments[:-1] if segments[-1].attention == "causal" else segments
        texts = [s for s in segments if s.attention == "causal"]
        empty = qwen2_mot.empty_cache(config.mot, noise.shape[0])
        times = generation.sampling_times(config.num_timesteps, config.sample_timestep_shift)
        guided = [guidance.is_active(config.guidance, t) for t in times[:-1]]
        # The contexts given are not read, hence not computed in the compiled program.
        parts = (segments, keep, texts) if any(guided) else (segments,)
        branches = [bagel.extend(params, config, part, empty)[0] for part in parts]

        def velocity(cache, x, t):
            t = jnp.full(x.shape[:1], t)
            return generation.predict(params, config, self.tokenizer, [cache], x, t, side, side)

        def euler(x, step):
            t, size, guide = step

            def combined():
                return guidance.combine(config.guidance, *(velocity(c, x, t) for c in branches))

            def plain():
                return velocity(branches[0], x, t)

            v = jax.lax.cond(guide, combined, plain) if any(guided) else plain()
            return x - v * size, None

        steps = (times[:-1], times[:-1] - times[1:], np.asarray(guided))
        return jax.lax.scan(euler, noise, jax.tree.map(jnp.asarray, steps))[0]

    def success_probability(self, params, state):
        features = state.memory[self.cameras[0]].features

        def one(features, observation, key):
            del key  # the most probable text is generated
            return self.decoded_answer(params, features, observation)

        return _one_by_one(one, (features, state.observation), jax.random.key(0))

    def decoded_answer(self, params, features, observation):
        """Whether the text generated for one observation (batch axis 1), of whose first view the
        ViT features are given, starts with "Yes" [1]: prefix, then token by token to its end."""
        config, mot = self.config, self.config.mot
        *context, question = self.answer_segments(params, features, observation)
        start = dataclasses.replace(question, und=question.und[:, -1:])
        question = dataclasses.replace(question, und=question.und[:, :-1])
        cache = qwen2_mot.empty_cache(mot, 1)
        for segment in (*context, question):
            cache = bagel.extend(params, config, [segment], cache)[0]
        tokens = []
        for _ in range(2):  # the answer and the end of the text
            cache, hidden, _ = bagel.extend(params, config, [start], cache)
            tokens.append(jnp.argmax(qwen2_mot.logits(params["mot"], hidden[:, -1]), axis=-1))
            start = bagel.text_segment(params, config, tokens[-1][:, None])
        # Both tokens are returned, for neither may be optimised away.
        return jnp.where(tokens[1] >= 0, tokens[0] == self.yes_id, False)


def _one_by_one(function: Callable, inputs: tuple, key: jax.Array):
    """function(*inputs, key) [B] with one example after the other, each with a key of its own."""

    def one(row):
        *row, row_key = jax.tree.map(lambda x: x[None], row)
        return jax.tree.map(lambda x: x[0], function(*row, row_key[0]))

    keys = jax.random.split(key, len(jax.tree.leaves(inputs)[0]))
    return jax.lax.map(one, (*inputs, keys))


def sizes() -> dict[str, UMMConfig]:
    """The variants as BAGEL samples them: velocity, actions as text, the paper's guidance; float32
    on CPU, bfloat16 on an accelerator."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def released(name: str) -> UMMConfig:
        config = variant(name)
        return dataclasses.replace(
            config,
            actions_as="text",
            guidance=PAPER_GUIDANCE,
            num_timesteps=EVALUATIONS[name] + 1,
            sample_timestep_shift=4.0,
            mot=dataclasses.replace(config.mot, dtype=dtype, remat=False),
            vit=dataclasses.replace(config.vit, dtype=dtype),
        )

    names = {"tiny": "latent", "small": "latent_small", "bagel": "bagel"}
    return {size: released(name) for size, name in names.items()}


def run(size: str, batch_sizes: list[int], repeats: int) -> list[dict]:
    """Rows: a predicted chunk (both views) and a reward at every batch size beside the reference
    order, then at the last batch size the effect of each option on a chunk."""
    config = sizes()[size]
    dtype = jnp.dtype(config.mot.dtype)
    peak = matmul_peak(dtype, 1024 if jax.default_backend() == "cpu" else 8192)
    world, reference = build(config), build(config, ReferenceOrder)
    params = awake(jax.jit(world.init)(jax.random.key(0)))
    rows = []
    for batch in batch_sizes:
        observation, actions = inputs(world, batch)
        for work in ("chunk", "reward"):
            extra = (actions, jax.random.key(1)) if work == "chunk" else ()
            method = predictor if work == "chunk" else judge
            arguments = (params, observation, *extra)
            methods = {"ours": method(world), "peer": method(reference)}
            seconds = _race(methods, arguments, repeats, f"{size}, {work} batch {batch}")
            flops = matmul_flops(methods["ours"], *arguments)
            row = {"size": size, "work": work, "batch": batch}
            rows.append(row | measured(seconds, flops, peak))
    return rows + _options(size, config, params, batch_sizes[-1], repeats)


def awake(params: Params) -> Params:
    """Fresh parameters with a random head in place of the zero one, so that predictions vary."""
    adapters = params["adapters"]
    kernel = adapters["llm2vae"]["kernel"]
    kernel = 0.1 * jax.random.normal(jax.random.key(1), kernel.shape)
    head = {**adapters["llm2vae"], "kernel": kernel}
    return {**params, "adapters": {**adapters, "llm2vae": head}}


def _options(size: str, config: UMMConfig, params: Params, batch: int, repeats: int) -> list[dict]:
    """Time of a chunk with one option changed, relative to the configuration without the change,
    and how far that moves the images (root mean square, grey levels)."""
    changes = {
        "no guidance": {"guidance": GuidanceConfig()},
        "half the evaluations": {"num_timesteps": (config.num_timesteps + 1) // 2},
        "every 2nd evaluated": {"evaluate_every": 2},
        "every 3rd evaluated": {"evaluate_every": 3},
    }
    world = build(config)
    observation, actions = inputs(world, batch)
    arguments = (params, observation, actions, jax.random.key(1))
    rows = []
    for name, change in changes.items():
        changed = build(dataclasses.replace(config, **change))
        methods = {"ours": predictor(changed), "peer": predictor(world)}
        seconds = _race(methods, arguments, repeats, f"{size}, {name}")
        images = [jax.jit(method)(*arguments).images for method in methods.values()]
        errors = [
            jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).mean()
            for a, b in zip(*(i.values() for i in images))
        ]
        row = {"size": size, "work": name, "batch": batch, **measured(seconds)}
        row["rms_change"] = float(jnp.sqrt(jnp.mean(jnp.stack(errors))))
        rows.append(row)
    return rows


def _race(methods: dict[str, Callable], arguments: tuple, repeats: int, name: str):
    runs = {key: timed(jax.jit(method), *arguments) for key, method in methods.items()}
    return interleave(runs, repeats, name)


def build(config: UMMConfig, kind: type[UMMWorld] = UMMWorld) -> UMMWorld:
    """The model for one arm, with two views."""
    return kind(config, CAMERAS, config.vae_image_size, ACTION_DIM, CHUNK, EmbeddedTokenizer())


def inputs(world: UMMWorld, batch: int) -> tuple[Observation, jax.Array]:
    """Observations of noise and random actions."""
    rng = np.random.default_rng(0)
    size = (batch, world.image_size, world.image_size, 3)
    images = {camera: rng.integers(0, 256, size).astype(np.uint8) for camera in CAMERAS}
    prompt = Prompt(np.full((batch, PROMPT), 5, np.int32), np.ones((batch, PROMPT), bool))
    observation = Observation(images, np.zeros((batch, 8), np.float32), prompt, prompt)
    actions = rng.uniform(-1, 1, (batch, CHUNK, ACTION_DIM)).astype(np.float32)
    return jax.device_put((observation, actions))
