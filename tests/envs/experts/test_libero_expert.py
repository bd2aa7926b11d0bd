"""LIBERO's scripted expert on the default task."""

import dataclasses

import numpy as np
import pytest

from mbpo_jax.envs.experts.libero_expert import check_supported
from mbpo_jax.envs.experts.motion import Hand, exactly
from mbpo_jax.envs.experts.scene import Scene
from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim.libero import LiberoEnv
from mbpo_jax.envs.sim.rollout import run_expert
from mbpo_jax.envs.suites import expert_actions

pytestmark = pytest.mark.libero


def run(env, *arguments, **changes):
    return run_expert(env, EpisodeRequest(*arguments, **changes), expert_actions)


@pytest.fixture(scope="module")
def clean(book_env):
    return run(book_env, 5, seed=2).episode


def test_it_puts_the_book_into_the_caddy(clean):
    assert clean.success
    assert clean.goal_fraction == 1.0
    assert clean.length < 100
    assert clean.source == "expert"
    assert (clean.seed, clean.init_state_id) == (2, -1)


def test_frames_are_strided_and_the_last_five_are_there(clean):
    steps, length = clean.timesteps, clean.length
    assert list(steps[-5:]) == list(range(length - 4, length + 1))
    assert set(np.diff(steps[:-5])) <= {5}
    np.testing.assert_array_equal(clean.num_actions, np.minimum(10, length - steps))
    for frames in clean.images.values():
        assert frames.shape == (len(steps), 64, 64, 3)
        assert frames.reshape(len(steps), -1).std(axis=1).min() > 20
    assert clean.proprio.shape == (len(steps), 8)


def test_without_jitter_the_labels_are_what_was_sent(clean):
    np.testing.assert_array_equal(clean.actions, clean.target_actions)


def test_jitter_is_on_the_sent_actions_of_the_arm_only(book_env):
    noisy = run(book_env, 5, seed=2, action_noise=(0.2,)).episode
    assert noisy.success
    difference = noisy.actions - noisy.target_actions
    assert 0.05 < difference[..., :6].std() < 0.25
    np.testing.assert_array_equal(difference[..., 6], 0)
    assert np.abs(noisy.actions).max() <= 1
    assert np.abs(noisy.target_actions).max() <= 1


def test_an_expert_that_misses_grasps_and_puts_down_beside_its_places(book_env, clean):
    misses = []

    def closed_at(miss):
        book_env.reset_to(EpisodeRequest(5, seed=2))
        for action in expert_actions(book_env, miss):
            if action[6] > 0:
                return Hand(book_env).position
            book_env.step(action)

    def by_15_mm():
        misses.append(np.array([0.015, 0.0]))
        return misses[-1]

    off = closed_at(by_15_mm) - closed_at(lambda: np.zeros(2))
    np.testing.assert_allclose(off, [0.015, 0, 0], atol=0.008)
    assert len(misses) == 1
    book_env.reset_to(EpisodeRequest(5, seed=2))
    sent = []
    for action in expert_actions(book_env, by_15_mm):
        sent.append(action)
        book_env.step(action)
        if book_env.over:
            break
    assert len(misses) >= 3  # a grasp and a placing more
    habit = run(book_env, 5, seed=2, aim_offset=(0.015, 0.0)).episode
    first = habit.timesteps[0]
    np.testing.assert_allclose(habit.actions[0], np.array(sent)[first : first + 10], atol=1e-6)
    one, other = (run(book_env, 5, seed=2, aim_error=0.015).episode for _ in range(2))
    np.testing.assert_array_equal(one.actions, other.actions)
    assert not np.array_equal(one.actions[:5], clean.actions[:5])


def test_a_repeat_is_equal_bit_for_bit_whatever_came_between(book_env, clean):
    run(book_env, 5, seed=9, max_steps=40)
    again = run(book_env, 5, seed=2).episode
    for field in dataclasses.fields(clean):
        before, after = getattr(clean, field.name), getattr(again, field.name)
        if isinstance(before, dict):
            for camera in before:
                np.testing.assert_array_equal(before[camera], after[camera])
        else:
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("suite", "task", "seed"),
    [
        ("libero_goal", 5, 3),  # a plate, held by its rim, hangs lower than the hand
        ("libero_10", 3, 5),  # a bowl, 5 mm narrower than the mouth of its drawer
    ],
)
def test_what_is_held_or_put_by_a_hair_is_done_at_the_first_attempt(suite, task, seed):
    env = LiberoEnv(suite, task, cameras=())
    try:
        env.reset_to(EpisodeRequest(task, seed=seed, max_steps=200))
        for action in expert_actions(env, exactly):
            env.step(action)
            if env.over:
                break
        assert env.success
        assert env.num_steps < 160
    finally:
        env.close()


def test_a_door_in_the_arms_way_is_pushed_open_first():
    env = LiberoEnv("libero_10", 9, cameras=())
    try:
        env.reset_to(EpisodeRequest(9, seed=12))
        door = Scene(env, exactly).part("microwave_1")
        openings = [door.opening]
        for action in expert_actions(env, exactly):
            env.step(action)
            openings.append(door.opening)
            if env.over:
                break
        # Half open it is on the way: the hand would push it shut before the mug is inside.
        assert openings[0] < 0.8 * door.range
        assert max(openings) > 0.9 * door.range
        assert env.success
        assert openings[-1] < 0.05
    finally:
        env.close()


def test_a_failure_has_no_frames(book_env):
    result = run(book_env, 5, seed=2, max_steps=20)
    episode = result.episode
    assert not episode.success
    assert episode.length == 20
    assert episode.images["agentview"].shape == (0, 64, 64, 3)
    assert episode.actions.shape == (0, 10, 7)


@pytest.mark.parametrize(
    ("goal", "reason"),
    [
        (("folded", "shirt_1"), "cannot achieve 'folded shirt_1': it knows the predicates in, on"),
        (("open", "microwave_1"), "cannot achieve 'open microwave_1': it opens drawers, but no"),
    ],
)
def test_an_unknown_goal_is_refused(book_env, monkeypatch, goal, reason):
    monkeypatch.setattr(book_env, "goals", [goal])
    with pytest.raises(ValueError, match=reason):
        check_supported(book_env)


def test_a_stride_that_does_not_divide_the_chunk_is_refused(book_env):
    with pytest.raises(ValueError, match="must divide the chunk"):
        run(book_env, 5, seed=2, render_every=3)
