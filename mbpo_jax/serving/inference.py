"""A trained policy behind the server: messages to observations, observations to action chunks."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from mbpo_jax.data.normalization import read_norm_stats
from mbpo_jax.data.pipelines import collate
from mbpo_jax.data.tokenizers import pad_prompt
from mbpo_jax.policy.checkpoint import load_openpi as load_openpi_params
from mbpo_jax.policy.config import FlowConfig
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.stages.acting import Act, acting_program, load_selection
from mbpo_jax.stages.build import (
    Config,
    build_policy,
    load_policy,
    policy_tokenizer,
    robot,
    world_tokenizer,
)
from mbpo_jax.stages.workspace import StageError, Workspace, read_config
from mbpo_jax.training.checkpoints import best_state
from mbpo_jax.types import Observation, Params, Prompt

OPENPI_IMAGES = ("observation/image", "observation/wrist_image")  # of the first two cameras
STATE = "observation/state"
INSTRUCTION = "prompt"
NEEDED = ("robot", "cameras", "image_size", "chunk", "seed", "pretrained", "policy")
IDENTITY = ("episode", "chunk_index")


class Request(NamedTuple):
    """One chunk that is asked for. `identity` = (episode, chunk) decides its noise."""

    observation: Observation  # no batch axis
    identity: tuple[int, int]


class ServedPolicy:
    """A policy compiled for a few batch sizes.

    Args:
        act: how it acts with `params`; `policy.act` by default.

    Attributes:
        metadata: what a client is told of it on connection.
        max_batch: requests that `infer` takes at most.
    """

    def __init__(
        self,
        config: Config,
        policy: FlowPolicy,
        params: Params,
        batch_sizes: Sequence[int] = (1, 4, 16),
        act: Act | None = None,
    ):
        self._config, self._params = config, params
        self._state_dim = len(policy.proprio_stats.mean)
        readers = [(policy_tokenizer(config), config.policy.max_prompt_tokens)]
        if act is not None:  # a world model reads the instruction too
            readers.append((world_tokenizer(config), config.world_model.max_prompt_tokens))

        @functools.lru_cache(maxsize=1024)
        def tokenize(instruction: str) -> tuple[Prompt, Prompt]:
            prompts = [
                pad_prompt(tokenizer.encode(instruction), length, instruction, tokenizer.pad_id)
                for tokenizer, length in readers
            ]
            return prompts[0], prompts[-1]

        self._tokenize = tokenize
        self._image_keys = {
            camera: [f"observation/{camera}", *OPENPI_IMAGES[i : i + 1]]
            for i, camera in enumerate(config.cameras)
        }
        self.metadata = {
            "cameras": list(config.cameras),
            "image_keys": self._image_keys,
            "image_size": config.image_size,
            "state_dim": self._state_dim,
            "action_dim": policy.env_action_dim,
            "action_horizon": config.chunk,
        }
        self.max_batch = max(batch_sizes)
        self._programs = self._compile(
            acting_program(act or policy.act, config.seed), sorted(batch_sizes)
        )

    def _compile(self, program, batch_sizes: Sequence[int]) -> dict:
        size = self._config.image_size
        images = {camera: np.zeros((size, size, 3), np.uint8) for camera in self._config.cameras}
        blank = Observation(images, np.zeros(self._state_dim, np.float32), *self._tokenize(""))
        programs = {}
        for batch in tqdm(batch_sizes, desc="compiling batch sizes"):
            observations = collate([blank] * batch)
            identities = np.zeros((batch, len(IDENTITY)), np.int32)
            programs[batch] = program.lower(self._params, observations, identities).compile()
        return programs

    def request(self, message: Any, identity: tuple[int, int]) -> Request:
        """What a client's message asks for.

        Args:
            message: keys as in `metadata`, `observation/state` and `prompt`; optionally `episode`
                and `chunk_index`, whole numbers that take the place of `identity`.

        Raises:
            ValueError: naming the entry that is missing or wrong.
        """
        if not isinstance(message, dict):
            raise ValueError(f"an observation is a map, not {type(message).__name__}")
        images = {camera: self._image(message, camera) for camera in self._config.cameras}
        instruction = message.get(INSTRUCTION)
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"{INSTRUCTION!r} must be a text that is not empty")
        observation = Observation(images, self._state(message), *self._tokenize(instruction))
        return Request(
            observation, tuple(_whole(message, key, i) for key, i in zip(IDENTITY, identity))
        )

    def infer(self, requests: Sequence[Request]) -> np.ndarray:
        """Action chunks float32 [n, k, A] of 1 to `max_batch` requests, in the robot's units."""
        batch = min(size for size in self._programs if size >= len(requests))
        padded = [*requests, *[requests[0]] * (batch - len(requests))]
        observations = collate([request.observation for request in padded])
        identities = np.array([request.identity for request in padded], np.int32)
        actions = self._programs[batch](self._params, observations, identities)
        return np.asarray(actions)[: len(requests)]

    def answer(self, messages: Sequence[Mapping]) -> np.ndarray:
        """Chunks float32 [n, k, A] of 1 to `max_batch` messages that name their noise themselves.
        Raises as `request`."""
        return self.infer([self.request(message, (0, 0)) for message in messages])

    def _image(self, message: Mapping, camera: str) -> np.ndarray:
        keys = self._image_keys[camera]
        key = next((key for key in keys if key in message), None)
        if key is None:
            raise ValueError(f"no image of camera {camera!r}: send it as {' or '.join(keys)}")
        image = message[key]
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"{key!r} is {kind}: send a uint8 array [height, width, 3]")
        if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise ValueError(f"{key!r} has shape {image.shape}: send [height, width, 3]")
        size = (self._config.image_size,) * 2
        if image.shape[:2] == size:
            return image
        return np.asarray(ImageOps.pad(Image.fromarray(image), size, Image.Resampling.BILINEAR))

    def _state(self, message: Mapping) -> np.ndarray:
        try:
            state = np.asarray(message.get(STATE), np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{STATE!r} is not an array of numbers ({error})") from error
        if state.shape != (self._state_dim,) or not np.isfinite(state).all():
            raise ValueError(
                f"{STATE!r} must be {self._state_dim} finite numbers, not shape {state.shape} "
                f"with {int((~np.isfinite(state)).sum())} that are not finite"
            )
        return state


def load(
    checkpoint: Path,
    batch_sizes: Sequence[int],
    best_of: int = 1,
    best_of_chunks: int = 1,
    best: bool = False,
) -> ServedPolicy:
    """The policy that the stage `sft` or `improve` left in its folder `checkpoint`.

    Args:
        best: of `improve`, its state of the highest imagined success instead of its last; the stage
            need not have finished.
        best_of: above 1 it acts on the best of so many imagined chunks, by the world model and the
            value of the same run (`selection`), `best_of_chunks` ahead.

    Raises:
        FileNotFoundError: there is no best state.
        StageError: there is none, or nothing to choose by, or a record of the run is lost.
        ValueError: its parameters or statistics are damaged, or a `best_of` or `best_of_chunks` is
            below 1.
    """
    if best_of < 1:
        raise ValueError(f"best_of is {best_of}: choose among 1 chunk or more")
    checkpoint = Path(checkpoint).absolute()
    actor = checkpoint / "policy"
    if best:
        actor = best_state(checkpoint / "checkpoints", "imagined_success")
    if not actor.is_dir():
        raise StageError(
            f"{checkpoint} holds no policy; pass the folder of a finished stage sft or improve in "
            "a working directory, such as runs/libero_long_micro/improve"
        )
    config = read_config(checkpoint.parent, NEEDED)
    with config.unlocked():
        config.rl = config.get("rl", {})
        if "flow" not in config.rl:  # before `improve`; acting does not depend on its entries
            config.rl.flow = dataclasses.asdict(FlowConfig())
    policy, params = load_policy(config, checkpoint.parent / "sft", actor)
    if best_of == 1:
        return ServedPolicy(config, policy, params, batch_sizes)
    Workspace(checkpoint.parent, config).require("value")
    with config.unlocked():
        config.evaluation = {"best_of": best_of, "best_of_chunks": best_of_chunks}
    act, params = load_selection(config, checkpoint.parent, actor)
    return ServedPolicy(config, policy, params, batch_sizes, act)


def load_openpi(checkpoint: Path, config: Config, batch_sizes: Sequence[int]) -> ServedPolicy:
    """The policy of a checkpoint that openpi wrote: a training step's folder, with `params` and
    `assets/*/norm_stats.json`.

    Args:
        config: of a variant of its size (`configs/`), with the path of PaliGemma's tokeniser.

    Raises:
        ValueError: no such checkpoint, one of another size, or without statistics of this robot.
    """
    checkpoint = Path(checkpoint).absolute()
    found = sorted((checkpoint / "assets").rglob("norm_stats.json"))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(checkpoint)) for path in found) or "none"
        raise ValueError(
            f"{checkpoint} needs one norm_stats.json below assets, and there are: {names}. openpi "
            "writes it beside `params`; keep that of this robot"
        )
    embodiment = robot(config)
    widths = {"state": embodiment.state_dim, "actions": embodiment.action_dim}
    stats = read_norm_stats(found[0])  # openpi's older ones are padded to the model's width
    policy = build_policy(
        config,
        {name: jax.tree.map(lambda x, n=n: x[:n], stats[name]) for name, n in widths.items()},
    )
    params = {"actor": load_openpi_params(str(checkpoint / "params"), policy.config)}
    return ServedPolicy(config, policy, jax.jit(policy.for_inference)(params), batch_sizes)


def _whole(message: Mapping, key: str, default: int) -> int:
    value = message.get(key, default)
    if not isinstance(value, int | np.integer) or not 0 <= value < 2**31:
        raise ValueError(f"{key!r} must be a whole number from 0 to 2^31 - 1, not {value!r:.80}")
    return int(value)
