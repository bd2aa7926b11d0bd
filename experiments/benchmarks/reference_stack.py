"""Imagination in the order and over the processes of the public VLA-MBPO code, from this package's
own modules: the policy here, the world model in a second process behind a websocket.

`third_party/reference_stack/README.md` says what is imitated and what is not.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import jax
import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize

from experiments.benchmarks.world_model import ReferenceOrder
from mbpo_jax.nn import navit
from mbpo_jax.shapes import Array, Float, UInt8
from mbpo_jax.types import Branch, Observation, Params, Policy, Prompt
from mbpo_jax.world_model import generation
from mbpo_jax.world_model.autoencoder import to_pixels, to_uint8
from mbpo_jax.world_model.frames import Frame
from mbpo_jax.world_model.umm_world import UMMWorld

Ask = Callable[[dict], dict]
# No limits, no compression, no keep-alive: requests are large and answers take long.
_SOCKET = {"compression": None, "max_size": None, "ping_interval": None}


class SteppedWorld(UMMWorld):
    """A world model whose `step` is taken apart, to be timed or served part by part."""

    def frame(self, params: Params, images: UInt8[Array, "B H W 3"], key: Array) -> Frame:
        """One view, encoded by the autoencoder; without ViT features."""
        moments = self.autoencoder.moments(params, images)
        latents = self.autoencoder.latents(moments, key)
        tokens = navit.patchify(latents, self.config.latent_patch)
        return Frame(to_pixels(images), tokens, None)

    def view(
        self,
        params: Params,
        observation: Observation,
        frames: dict[str, Frame],
        done: dict[str, Frame],
        actions: Float[Array, "B k A"],
        key: Array,
        camera: str,
    ) -> Float[Array, "B n v"]:
        """Latent tokens of `camera` a chunk later, from the current `frames` and those `done`."""
        frames, done = (
            {c: self.seen(params, frame) for c, frame in group.items()} for group in (frames, done)
        )
        action = self._action(params, actions)
        segments = [
            self._prompt(params, observation),
            *self._conditions(params, camera, frames, done, action),
        ]
        contexts = generation.build_contexts(params, self.config, segments)
        key = jax.random.fold_in(key, self.cameras.index(camera))
        noise = jax.random.normal(key, frames[camera].tokens.shape)
        return self.view_tokens(params, segments, contexts, noise)

    def picture(
        self, params: Params, tokens: Float[Array, "B n v"], camera: str
    ) -> UInt8[Array, "B H W 3"]:
        """The decoded image of a view's tokens."""
        pixels = self.autoencoder.decode(params, tokens)
        return to_uint8(self._finish(params, camera, pixels, tokens).pixels)


class ServedWorld(SteppedWorld, ReferenceOrder):
    """The parts, each computed in the order of the public server."""

    def answer(self, params: Params, observation: Observation) -> Array:
        """`decoded_answer` for the head image of one observation."""
        features = self.first_view_features(params, observation)
        return self.decoded_answer(params, features, observation)


class Server:
    """Answers the two requests of the public server, "edit" and "understand"."""

    def __init__(self, world: ServedWorld, params: Params):
        self._cameras, self._params = world.cameras, jax.device_put(params)
        self._frame = jax.jit(world.frame)
        self._view = jax.jit(world.view, static_argnames="camera")
        self._picture = jax.jit(world.picture, static_argnames="camera")
        self._answer = jax.jit(world.answer)

    def __call__(self, request: dict) -> dict:
        """The reply to a request, with the "seconds" it took here."""
        started = time.perf_counter()
        methods = {"edit": self._edit, "understand": self._understand}
        reply = methods[request["method"]](request)
        return {**reply, "seconds": time.perf_counter() - started}

    def _edit(self, request: dict) -> dict:
        """The images a chunk later, view after view: every view encodes its conditions anew from
        bytes, the images generated before it among them."""
        observation = _observation(request)
        key = jax.random.wrap_key_data(request["key"])
        new: dict[str, np.ndarray] = {}
        for camera in self._cameras:
            seen = [camera] if new else self._cameras
            frames = {c: self._frame(self._params, observation.images[c], key) for c in seen}
            done = {c: self._frame(self._params, image, key) for c, image in new.items()}
            tokens = self._view(
                self._params, observation, frames, done, request["actions"], key, camera=camera
            )
            new[camera] = self._pictures(tokens, camera)
        return {"images": new}

    def _pictures(self, tokens: Array, camera: str) -> np.ndarray:
        """Decoded one by one."""
        rows = _rows(jax.device_get(tokens), len(tokens))
        pictures = [self._picture(self._params, row, camera=camera) for row in rows]
        return np.concatenate(jax.device_get(pictures))

    def _understand(self, request: dict) -> dict:
        """Whether the generated answer is "Yes", image by image."""
        rows = _rows(_observation(request), len(request["tokens"]))
        return {"done": np.array([bool(self._answer(self._params, row)) for row in rows])}


def _observation(request: dict) -> Observation:
    prompt = Prompt(request["tokens"], request["mask"])
    return Observation(request["images"], request["proprio"], prompt, prompt)


def _rows(batch, count: int) -> list:
    """The `count` examples of a host batch, each with a batch axis of 1."""
    return [jax.tree.map(lambda x: x[i : i + 1], batch) for i in range(count)]  # noqa: B023


def serve(world: ServedWorld, params: Params, parent: Connection) -> None:
    """Answers requests on a free port of this machine, which is sent to `parent`, for ever."""
    from websockets.sync.server import serve as listen

    server = Server(world, params)

    def talk(socket):
        for message in socket:
            socket.send(msgpack_serialize(server(msgpack_restore(message))))

    with listen(talk, "127.0.0.1", 0, **_SOCKET) as listener:
        parent.send(listener.socket.getsockname()[1])
        listener.serve_forever()


@contextmanager
def world_process(world: ServedWorld, params: Params) -> Iterator[Ask]:
    """A second process that serves the world model; gives a function that asks it.

    Raises:
        RuntimeError: the process ended before it listened; its message is on the terminal.
    """
    from websockets.sync.client import connect

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (world, jax.device_get(params), theirs)
    process = context.Process(target=serve, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        try:
            port = ours.recv()
        except EOFError as error:
            raise RuntimeError("the world model's process ended before it listened") from error
        with connect(f"ws://127.0.0.1:{port}", **_SOCKET) as socket:

            def ask(request: dict) -> dict:
                socket.send(msgpack_serialize(request))
                return msgpack_restore(socket.recv())

            yield ask
    finally:
        process.terminate()
        process.join()


class ReferenceImagination:
    """`mbpo.imagine` for a world model that is asked over a connection, in a Python loop
    with every observation in host memory. `seconds` holds where the last call spent its time."""

    def __init__(self, policy: Policy, ask: Ask, cameras: tuple[str, ...], chunks: int):
        def sample(params, observation, key):
            prefix = policy.encode(params, observation)
            return policy.sample(params, prefix, key), policy.value(params, prefix)

        def value(params, observation):
            return policy.value(params, policy.encode(params, observation))

        self._sample, self._value = jax.jit(sample), jax.jit(value)
        self._ask, self._head, self._chunks = ask, cameras[0], chunks
        self.seconds: dict[str, float] = {}

    def __call__(self, params: Params, start: Observation, key: Array) -> Branch:
        """A `Branch` of NumPy arrays from host observations `start` [M]."""
        self.seconds = dict.fromkeys(("policy", "dynamics", "reward", "transport", "value"), 0.0)
        observation, records = start, []
        alive = np.ones(len(start.proprio), np.float32)
        _, *keys = jax.random.split(key, 1 + self._chunks)  # the first encodes the start
        for chunk_key in keys:
            sample_key, world_key = jax.random.split(chunk_key)
            sample, value = self._timed("policy", self._sample, params, observation, sample_key)
            following = self._following(observation, sample.actions, world_key)
            done = self._done(following)
            record = {"observation": observation, "value": value, "chain": sample.chain}
            record |= {"actions": sample.actions, "log_prob": sample.log_prob}
            records.append(record | {"reward": done * alive, "done": done, "mask": alive})
            observation, alive = following, alive * (1.0 - done)
        stacked = jax.tree.map(lambda *x: np.stack(x), *records)
        bootstrap = self._timed("value", self._value, params, observation)
        return Branch(**stacked, last_observation=observation, bootstrap_value=bootstrap)

    def _following(self, observation: Observation, actions: np.ndarray, key: Array) -> Observation:
        key = np.asarray(jax.random.key_data(key))
        request = {"method": "edit", "actions": actions, "key": key}
        reply = self._request("dynamics", request, observation, observation.images)
        return observation.replace(images=reply["images"])

    def _done(self, observation: Observation) -> np.ndarray:
        head = {self._head: observation.images[self._head]}
        reply = self._request("reward", {"method": "understand"}, observation, head)
        return reply["done"].astype(np.float32)

    def _request(self, part: str, request: dict, observation: Observation, images: dict) -> dict:
        prompt = observation.world_prompt
        request |= {"tokens": prompt.tokens, "mask": prompt.mask}
        request |= {"images": dict(images), "proprio": observation.proprio}
        started = time.perf_counter()
        reply = self._ask(request)
        self.seconds[part] += reply["seconds"]
        self.seconds["transport"] += time.perf_counter() - started - reply["seconds"]
        return reply

    def _timed(self, part: str, function: Callable, *arguments):
        started = time.perf_counter()
        result = jax.device_get(function(*arguments))
        self.seconds[part] += time.perf_counter() - started
        return result
