import itertools

import jax
import numpy as np
import pytest

from mbpo_jax.data.pipelines import (
    ObservationBuilder,
    batches,
    branch_starts,
    by_label,
    collate,
    demonstrations,
    equal_parts,
    reward_examples,
    split_episodes,
    transition_sequences,
    transitions,
)
from mbpo_jax.data.tokenizers import EmbeddedTokenizer


@pytest.fixture
def builder():
    tokenizer = EmbeddedTokenizer()
    return ObservationBuilder(("agentview", "wrist"), tokenizer, 8, tokenizer, 6)


def rows(source):
    return [tuple(row) for row in source.index.tolist()]


def first(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_observation(builder, make_episode):
    episode = make_episode([0, 4, 7])
    observation = builder.at(episode, 1)
    assert list(observation.images) == ["agentview", "wrist"]
    assert np.shares_memory(observation.images["wrist"], episode.images["wrist"])
    np.testing.assert_array_equal(observation.images["wrist"], episode.images["wrist"][1])
    np.testing.assert_array_equal(observation.proprio, episode.proprio[1])
    ids = EmbeddedTokenizer().encode("pick up the book")
    np.testing.assert_array_equal(observation.prompt.tokens, ids + [0] * (8 - len(ids)))
    block = [EmbeddedTokenizer.bos_id, *ids, EmbeddedTokenizer.eos_id]
    np.testing.assert_array_equal(observation.world_prompt.tokens, block + [0] * (6 - len(block)))
    assert observation.prompt.mask.sum() == len(ids)


def test_observation_with_batch_axes(builder, make_episode):
    episode = make_episode([0, 4, 7])
    whole = builder(episode.images, episode.proprio, episode.instruction)
    assert_equal_trees(whole, collate([builder.at(episode, f) for f in range(3)]))


def test_observation_bad_input(make_episode):
    tokenizer, episode = EmbeddedTokenizer(), make_episode([0, 1])
    with pytest.raises(ValueError, match=r"no images of cameras \['left'\]"):
        ObservationBuilder(("agentview", "left"), tokenizer, 8, tokenizer, 8).at(episode, 0)
    with pytest.raises(ValueError, match="'pick up the book' takes 4 tokens"):
        ObservationBuilder(("agentview",), tokenizer, 8, tokenizer, 1).at(episode, 0)


def test_demonstrations(builder, make_episode):
    episodes = [make_episode([0, 4, 7]), make_episode([0, 2], success=False, seed=1)]
    source = demonstrations(episodes, builder)
    # The last frame of an episode has no action to imitate.
    assert rows(source) == [(0, 0), (0, 1), (1, 0)]
    assert [bool(source[i].quality) for i in range(3)] == [True, True, False]
    record = source[2]
    np.testing.assert_array_equal(record.actions, episodes[1].target_actions[0])
    assert_equal_trees(record.observation, builder.at(episodes[1], 0))


def test_transitions_of_a_success(builder, make_episode):
    episode = make_episode([0, 4, 8, 9, 10, 11, 12, 13])
    source = transitions([episode], builder, 4)
    # 0 -> 4 -> 8 -> 12 are whole chunks, 9 -> 13 too; from 10, 11 and 12 success comes first.
    assert rows(source) == [
        *[(0, 0, 1), (0, 1, 2), (0, 2, 6), (0, 3, 7), (0, 4, 7), (0, 5, 7), (0, 6, 7)]
    ]
    assert source.skipped == 0
    record = source[2]
    np.testing.assert_array_equal(record.actions, episode.actions[2])
    np.testing.assert_array_equal(record.next_images["wrist"], episode.images["wrist"][6])
    assert list(record.next_images) == ["agentview", "wrist"]


def test_transitions_skip_what_was_not_seen(builder, make_episode):
    episode = make_episode([0, 2, 4, 7], success=False)
    source = transitions([episode], builder, 4)
    # 2 -> 6 was not rendered; 4 -> 8 lies behind the time limit, which is not success.
    assert rows(source) == [(0, 0, 2)]
    assert source.skipped == 2


def test_episode_shorter_than_a_chunk(builder, make_episode):
    won, lost = make_episode([0, 1, 2]), make_episode([0, 1, 2], success=False)
    assert rows(transitions([won], builder, 4)) == [(0, 0, 2), (0, 1, 2)]
    nothing = transitions([lost], builder, 4)
    assert (len(nothing), nothing.skipped) == (0, 2)
    with pytest.raises(ValueError, match="no records"):
        batches(nothing, 2, seed=0)


def test_transitions_of_another_chunk_length(builder, make_episode):
    with pytest.raises(ValueError, match="chunks of 4 steps, less than 10"):
        transitions([make_episode([0, 4])], builder, 10)


def test_transition_sequences(builder, make_episode):
    episode = make_episode([0, 4, 8, 9, 10, 11, 12, 13])
    source = transition_sequences([episode], builder, 4, 2)
    # 0 -> 4 -> 8, 4 -> 8 -> 12, 8 -> 12 -> 13; after one chunk from 9 the episode is over.
    assert rows(source) == [(0, 0, 1, 2), (0, 1, 2, 6), (0, 2, 6, 7)]
    assert source.skipped == 4
    record = source[1]
    np.testing.assert_array_equal(record.actions, episode.actions[[1, 2]])
    np.testing.assert_array_equal(
        record.next_images["agentview"], episode.images["agentview"][[2, 6]]
    )
    np.testing.assert_array_equal(record.observation.proprio, episode.proprio[[1, 2]])


def test_reward_labels(builder, make_episode):
    won = make_episode([0, 9, 10, 11, 15, 16, 17, 20])
    lost = make_episode([0, 19, 20], success=False)
    source = reward_examples([won, lost], builder)
    # Steps left: 20, 11 | 10, 9, 5 are left out | 4, 3, 0. All of a failure is No.
    assert rows(source) == [
        *[(0, 0, 0), (0, 1, 0), (0, 5, 1), (0, 6, 1), (0, 7, 1)],
        *[(1, 0, 0), (1, 1, 0), (1, 2, 0)],
    ]
    assert source[2].label == 1
    assert source[2].label.dtype == np.float32
    assert_equal_trees(source[2].observation, builder.at(won, 5))
    no, yes = by_label(source)
    assert [no[i].label for i in range(len(no))] == [0] * 5
    assert [yes[i].label for i in range(len(yes))] == [1] * 3


def test_reward_set_of_one_label(builder, make_episode):
    lost = make_episode([0, 4], success=False)
    with pytest.raises(ValueError, match=r'none of the 2 reward frames is a "Yes"'):
        by_label(reward_examples([lost], builder))
    with pytest.raises(ValueError, match=r'none of the 2 reward frames is a "No"'):
        by_label(reward_examples([make_episode([0, 4])], builder))
    with pytest.raises(ValueError, match="none of the 0 reward frames"):
        by_label(reward_examples([], builder))


def test_branch_starts(builder, make_episode):
    won, lost = make_episode([0, 4, 12, 15, 16, 20]), make_episode([0, 4], success=False)
    source = branch_starts([won, lost], builder)
    # Not 16 and 20 of the success (it is done there), not the last frame of the failure.
    assert rows(source) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert_equal_trees(source[4], builder.at(lost, 0))


def test_batches_cover_every_epoch(builder, make_episode):
    source = demonstrations([make_episode(range(13))], builder)  # 12 records
    stream = first(batches(source, 4, seed=3), 6)
    proprio = np.concatenate([batch.observation.proprio for batch in stream])
    assert stream[0].observation.images["wrist"].shape == (4, 3, 2, 3)
    assert stream[0].actions.shape == (4, 4, 2)
    everything = np.unique(collate(list(source)).observation.proprio, axis=0)
    epochs = proprio[:12], proprio[12:]
    for epoch in epochs:
        np.testing.assert_array_equal(np.unique(epoch, axis=0), everything)
    assert not np.array_equal(*epochs)


def test_batches_resume_and_repeat(builder, make_episode):
    source = demonstrations([make_episode(range(13))], builder)
    stream = first(batches(source, 5, seed=3), 8)
    for a, b in zip(stream[5:], first(batches(source, 5, seed=3, start_step=5), 3), strict=True):
        assert_equal_trees(a, b)
    other = next(batches(source, 5, seed=4))
    assert not np.array_equal(stream[0].actions, other.actions)


def test_batch_larger_than_the_source(builder, make_episode):
    source = demonstrations([make_episode([0, 1, 2])], builder)
    assert next(batches(source, 7, seed=0)).actions.shape == (7, 4, 2)


def test_mixing_oversamples(builder, make_episode):
    won = make_episode(range(0, 41, 2))  # 15 No (40 .. 12 left), 3 Yes (4, 2, 0 left)
    no, yes = by_label(reward_examples([won], builder))
    assert (len(no), len(yes)) == (15, 3)
    stream = first(batches((no, yes), 8, seed=0, weights=(0.75, 0.25)), 30)
    assert [batch.label.sum() for batch in stream] == [2] * 30
    again = next(batches((no, yes), 8, seed=0, start_step=29, weights=(0.75, 0.25)))
    assert_equal_trees(stream[29], again)
    seen = np.concatenate([batch.observation.proprio for batch in stream])
    assert len(np.unique(seen, axis=0)) == 18


def test_split_is_by_episode_and_stratified(make_episode):
    episodes = [make_episode([0, 1], success=i % 5 != 0, seed=i) for i in range(20)]
    train, held = split_episodes(episodes, 0.25, seed=1)
    # 16 successes and 4 failures: a quarter of each.
    assert sum(e.success for e in held) == 4
    assert len(held) == 5
    assert sorted(e.seed for e in train + held) == list(range(20))
    assert [e.seed for e in train] == sorted(e.seed for e in train)
    again = split_episodes(episodes, 0.25, seed=1)
    assert [e.seed for e in again[1]] == [e.seed for e in held]
    assert [e.seed for e in split_episodes(episodes, 0.25, seed=2)[1]] != [e.seed for e in held]


def test_split_of_few(make_episode):
    episodes = [make_episode([0, 1], seed=i) for i in range(3)]
    episodes.append(make_episode([0, 1], success=False, seed=3))
    train, held = split_episodes(episodes, 0.05, seed=0)
    assert [e.success for e in held] == [True]
    assert len(train) == 3
    assert split_episodes(episodes, 0.0, seed=0) == (episodes, [])


def test_equal_parts_begin_with_every_record_in_order():
    np.testing.assert_array_equal(equal_parts(5, 2), [[0, 1], [2, 3], [4, 0]])
    np.testing.assert_array_equal(equal_parts(2, 5), [[0, 1, 0, 1, 0]])
    assert equal_parts(0, 4).shape == (0, 4)
