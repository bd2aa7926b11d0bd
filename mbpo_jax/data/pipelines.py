"""Batches out of episodes: windows, transitions, reward labels, branch starts.

A `Source` is random access: its index is built once, its records refer to the episodes' images.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from mbpo_jax.data.tokenizers import Tokenizer, WorldTokenizer, pad_prompt
from mbpo_jax.episode import Episode
from mbpo_jax.types import Demonstration, Observation, Prompt, RewardExample, Transition

YES_FRAMES = 5  # the last frames of a success, by time step
NO_MARGIN = 10  # frames of a success nearer to its end than this are ambiguous


class ObservationBuilder:
    """Camera frames, proprioception and an instruction as the models' `Observation`.

    Args:
        cameras: the views to keep, head first.
        policy_tokenizer, world_tokenizer: give the two prompts.
        prompt_length, world_prompt_length: tokens that the prompts are padded to.
    """

    def __init__(
        self,
        cameras: tuple[str, ...],
        policy_tokenizer: Tokenizer,
        prompt_length: int,
        world_tokenizer: WorldTokenizer,
        world_prompt_length: int,
    ):
        self.cameras = cameras
        self._policy = (policy_tokenizer, prompt_length)
        self._world = (world_tokenizer, world_prompt_length)
        self._prompts: dict[str, tuple[Prompt, Prompt]] = {}

    def __call__(
        self, images: Mapping[str, np.ndarray], proprio: np.ndarray, instruction: str
    ) -> Observation:
        """NumPy observation; `images` uint8 [*B, H, W, 3], `proprio` [*B, P].

        Raises:
            ValueError: a camera is missing, or the instruction is longer than a prompt.
        """
        missing = [camera for camera in self.cameras if camera not in images]
        if missing:
            raise ValueError(f"no images of cameras {missing}: there are {sorted(images)}")
        if instruction not in self._prompts:
            self._prompts[instruction] = self._tokenize(instruction)
        batch = proprio.shape[:-1]
        prompt, world_prompt = (
            jax.tree.map(lambda x: np.broadcast_to(x, (*batch, *x.shape)), prompt)
            for prompt in self._prompts[instruction]
        )
        return Observation(
            images={camera: images[camera] for camera in self.cameras},
            proprio=np.asarray(proprio, np.float32),
            prompt=prompt,
            world_prompt=world_prompt,
        )

    def prompt_problems(self, instruction: str) -> list[str]:
        """Which token budgets an instruction exceeds, and the config's entries that set them."""
        return [
            f"the prompt {instruction!r} takes {len(ids)} tokens, more than the budget of "
            f"{length}: raise --config.{entry}.max_prompt_tokens or shorten the instruction"
            for entry, ids, length, _ in self._encoded(instruction)
            if len(ids) > length
        ]

    def _tokenize(self, instruction: str) -> tuple[Prompt, Prompt]:
        policy, world = (
            pad_prompt(ids, length, instruction, pad_id)
            for _, ids, length, pad_id in self._encoded(instruction)
        )
        return policy, world

    def _encoded(self, instruction: str) -> list[tuple[str, list[int], int, int]]:
        """(section of the config, ids, budget, padding) of the policy's prompt, and of the world
        model's: a text block of BAGEL with its markers."""
        tokenizer, length = self._policy
        world, world_length = self._world
        block = [world.bos_id, *world.encode(instruction), world.eos_id]
        return [
            ("policy", tokenizer.encode(instruction), length, tokenizer.pad_id),
            ("world_model", block, world_length, world.pad_id),
        ]

    def at(self, episode: Episode, frame: int) -> Observation:
        """The observation of one frame of an episode, without a batch axis."""
        images = {camera: x[frame] for camera, x in episode.images.items()}
        return self(images, episode.proprio[frame], episode.instruction)


class Source(Sequence):
    """Records by position.

    Attributes:
        index: int [N, columns], a row per record; the first two columns are episode and frame.
        skipped: frames of the episodes that give no record although they carry actions.
    """

    def __init__(
        self, record: Callable[..., Any], index: Sequence[Sequence[int]], skipped: int = 0
    ):
        self._record = record
        self.index = np.asarray(index, np.int64)
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int):
        return self._record(*self.index[i].tolist())

    def where(self, chosen: np.ndarray) -> "Source":
        """The records at which `chosen` bool [N] is True, or at the positions `chosen`."""
        return Source(self._record, self.index[chosen], self.skipped)

    def map(self, function: Callable[..., Any]) -> "Source":
        """The records as `function(record, *row)`, `row` being the record's row of the index."""
        return Source(lambda *row: function(self._record(*row), *row), self.index, self.skipped)


def demonstrations(episodes: Sequence[Episode], builder: ObservationBuilder) -> Source:
    """`Demonstration`s: every frame from which at least one action was executed."""

    def record(e, f):
        episode = episodes[e]
        return Demonstration(
            builder.at(episode, f), episode.target_actions[f], np.float32(episode.success)
        )

    return Source(record, [(e, f) for e, f in _frames(episodes) if episodes[e].num_actions[f]])


def transitions(episodes: Sequence[Episode], builder: ObservationBuilder, chunk: int) -> Source:
    """`Transition`s of `chunk` steps, or fewer where success came first. `chunk` may be a part of
    the recorded chunks: then the first actions of each are taken.

    Frames whose next frame was not rendered, or whose chunk was cut off by a time limit, are
    skipped and counted.

    Raises:
        ValueError: the episodes were recorded with shorter chunks.
    """
    index, skipped = _chains(episodes, chunk, 1)
    return Source(_transition_record(episodes, builder, chunk), index, skipped)


def transition_sequences(
    episodes: Sequence[Episode], builder: ObservationBuilder, chunk: int, num_chunks: int
) -> Source:
    """Runs of `num_chunks` consecutive transitions: a `Transition` with leading axis [num_chunks].

    Raises:
        ValueError: as `transitions`.
    """
    transition = _transition_record(episodes, builder, chunk)
    index, skipped = _chains(episodes, chunk, num_chunks)

    def record(e, *frames):
        return collate([transition(e, f, g) for f, g in itertools.pairwise(frames)])

    return Source(record, index, skipped)


def reward_examples(episodes: Sequence[Episode], builder: ObservationBuilder) -> Source:
    """`RewardExample`s: 1 for the last 5 steps of a success, 0 for its frames more than 10 steps
    before the end and for every frame of a failure; frames in between are left out.

    The index has the label as third column.
    """

    def record(e, f, label):
        return RewardExample(builder.at(episodes[e], f), np.float32(label))

    labelled = ((e, f, _label(episodes[e], f)) for e, f in _frames(episodes))
    return Source(record, [row for row in labelled if row[-1] is not None])


def by_label(examples: Source) -> tuple[Source, Source]:
    """Splits `reward_examples` into (No, Yes), to be mixed at any ratio by `batches`.

    Raises:
        ValueError: one of the two is empty.
    """
    label = examples.index[:, -1] if len(examples) else np.zeros(0)
    no, yes = examples.where(label == 0), examples.where(label == 1)
    for name, source in (("No", no), ("Yes", yes)):
        if not len(source):
            raise ValueError(
                f'none of the {len(examples)} reward frames is a "{name}": the reward cannot be '
                "learned; collect episodes with "
                + ("successes" if name == "Yes" else "frames well before the success")
            )
    return no, yes


def branch_starts(episodes: Sequence[Episode], builder: ObservationBuilder) -> Source:
    """`Observation`s to imagine from: frames with an executed action that do not show success."""
    index = [
        (e, f)
        for e, f in _frames(episodes)
        if episodes[e].num_actions[f] and _label(episodes[e], f) != 1
    ]
    return Source(lambda e, f: builder.at(episodes[e], f), index)


def batches(
    source: Source | Sequence[Source],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    weights: Sequence[float] | None = None,
    shard: grain.sharding.ShardOptions | None = None,
) -> Iterator[Any]:
    """Endless shuffled batches, reshuffled every epoch; leaves are NumPy [rows, ...].

    Batch i depends on `seed` and i alone, so a stopped run resumes with `start_step=i`. A process
    reads and yields its own rows (`process_rows`) of the `batch_size`.

    Args:
        source: one source, or several to be mixed.
        weights: shares of the several sources in a batch; equal by default.
        shard: which of how many processes reads; this one of JAX's by default.

    Raises:
        ValueError: a source without records, or a batch that the processes do not divide.
    """
    shard = shard or grain.sharding.ShardByJaxProcess()
    rows = process_rows(batch_size, shard)
    sources = [source] if isinstance(source, Source) else list(source)
    for i, part in enumerate(sources):
        if not len(part):
            raise ValueError(f"source {i} of {len(sources)} has no records to make batches of")
    shuffled = [
        grain.MapDataset.source(part).seed(seed + i).shuffle().repeat()
        for i, part in enumerate(sources)
    ]
    mixed = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights)
    shares = mixed.batch(len(rows), drop_remainder=True, batch_fn=collate)
    first = start_step * shard.shard_count + shard.shard_index
    return (shares[i] for i in itertools.count(first, shard.shard_count))


def process_rows(batch_size: int, shard: grain.sharding.ShardOptions | None = None) -> np.ndarray:
    """Numbers int32 of the rows of a batch that a process holds, by default this one: equal and
    contiguous shares, in the order of the processes.

    Raises:
        ValueError: the processes do not divide the batch.
    """
    shard = shard or grain.sharding.ShardByJaxProcess()
    if batch_size % shard.shard_count:
        raise ValueError(
            f"a batch of {batch_size} does not divide over {shard.shard_count} processes"
        )
    share = batch_size // shard.shard_count
    return np.arange(share, dtype=np.int32) + shard.shard_index * share


def collate(records: Sequence[Any]) -> Any:
    """Stacks records of the same structure along a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *records)


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices spread evenly over range(total)."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).round().astype(int))


def collate_some(source: Source, wanted: int) -> Any:
    """At most `wanted` records of a source, spread evenly over it, `collate`d."""
    return collate([source[i] for i in spread(len(source), wanted)])


def equal_parts(count: int, size: int) -> np.ndarray:
    """The numbers of `count` records in their order, int [parts, size], for a program that is to be
    compiled for one shape: the last part is filled up with earlier records again."""
    return np.resize(np.arange(count), (-(-count // size), size))


def split_episodes(
    episodes: Sequence[Episode], holdout_fraction: float, seed: int
) -> tuple[list[Episode], list[Episode]]:
    """(training, held-out) episodes in their order; successes and failures are split alike.

    Of every kind with at least two episodes, one or more are held out and one or more are kept
    (unless the fraction is 0).
    """
    held = set()
    for success in (True, False):
        kind = [i for i, episode in enumerate(episodes) if episode.success == success]
        count = round(holdout_fraction * len(kind))
        if holdout_fraction > 0 and len(kind) > 1:
            count = min(max(count, 1), len(kind) - 1)
        order = np.random.default_rng((seed, int(success))).permutation(kind)
        held |= set(order[:count].tolist())
    train = [episode for i, episode in enumerate(episodes) if i not in held]
    return train, [episodes[i] for i in sorted(held)]


def _frames(episodes: Sequence[Episode]) -> Iterator[tuple[int, int]]:
    for e, episode in enumerate(episodes):
        for f in range(len(episode.timesteps)):
            yield e, f


def _label(episode: Episode, frame: int) -> int | None:
    """The reward label of a frame; None where it is ambiguous."""
    left = episode.length - int(episode.timesteps[frame])
    if not episode.success or left > NO_MARGIN:
        return 0
    return 1 if left < YES_FRAMES else None


def _chains(
    episodes: Sequence[Episode], chunk: int, num_chunks: int
) -> tuple[list[tuple[int, ...]], int]:
    """Rows (episode, frame_0, ..., frame_n), each frame one chunk after the one before it, and
    how many frames with actions start no such row."""
    rows, skipped = [], 0
    for e, episode in enumerate(episodes):
        if episode.actions.shape[1] < chunk:
            raise ValueError(
                f"episode {e} was recorded with chunks of {episode.actions.shape[1]} steps, "
                f"less than {chunk}: collect it again or set the chunk to that"
            )
        frame_at = {int(t): f for f, t in enumerate(episode.timesteps)}
        for f in range(len(episode.timesteps)):
            if not episode.num_actions[f]:
                continue
            chain = [f]
            while len(chain) <= num_chunks:
                now = int(episode.timesteps[chain[-1]])
                end = min(now + chunk, episode.length) if episode.success else now + chunk
                if end == now or end not in frame_at:
                    break
                chain.append(frame_at[end])
            if len(chain) == num_chunks + 1:
                rows.append((e, *chain))
            else:
                skipped += 1
    return rows, skipped


def _transition_record(episodes: Sequence[Episode], builder: ObservationBuilder, chunk: int):
    def record(e, f, g):
        episode = episodes[e]
        later = builder.at(episode, g)
        actions = episode.actions[f][:chunk]
        return Transition(builder.at(episode, f), actions, later.images, later.proprio)

    return record
