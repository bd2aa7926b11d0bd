"""The two-arm lift: what its environment and its expert share with nobody else."""

import numpy as np
import pytest

from configs import bimanual
from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim.rollout import run_expert
from mbpo_jax.envs.suites import expert_actions, task_info

pytestmark = pytest.mark.libero


@pytest.fixture(scope="module")
def episode(lift_env):
    request = EpisodeRequest(0, seed=1, action_noise=(0.2,))
    return run_expert(lift_env, request, expert_actions).episode


def test_unknown_tasks_name_what_there_is():
    with pytest.raises(ValueError, match="did you mean 'two_arm_lift'"):
        task_info("two_arms_lift", 0)
    with pytest.raises(ValueError, match="there is no 1"):
        task_info("two_arm_lift", 1)


def test_the_robot_of_the_config_is_the_simulators(lift_env):
    robot = bimanual.ROBOT
    assert robot.action_dim == lift_env.action_dim == 14
    assert robot.cameras == lift_env.cameras
    lift_env.reset(seed=0)
    assert lift_env.proprio().shape == (robot.state_dim,)
    still = np.flatnonzero(lift_env.jitter_scale == 0)
    assert [robot.actions[i] for i in still] == list(robot.grippers)
    assert 1 / lift_env.simulation.control_timestep == robot.control_hz


def test_the_first_arm_is_on_the_left_of_the_head_view(lift_env):
    """Arm 0 is the one of the left wrist camera; it alone moves, and only that side changes."""
    lift_env.reset(seed=0)
    before = lift_env.observe()[0]["agentview"].astype(int)
    for _ in range(6):
        lift_env.step(np.array([0, 0, 1, 0, 0, 0, -1] + [0] * 6 + [-1]))
    change = np.abs(lift_env.observe()[0]["agentview"] - before).sum(axis=(0, 2))
    assert change[:16].sum() > 5 * change[16:].sum()


def test_frames_are_upright(lift_env):
    lift_env.reset(seed=0)
    images, _ = lift_env.observe()
    assert list(images) == list(lift_env.cameras)
    head = images["agentview"].astype(int)
    # The white table is below the grey wall, and the grippers' hands are below their views.
    assert head[-8:].mean() > head[:8].mean() + 40
    for wrist in lift_env.cameras[1:]:
        assert images[wrist][-4:].mean() < images[wrist][:4].mean() - 40


def test_fixed_states_repeat_and_are_no_random_resets(lift_env):
    states = []
    for start in ({"init_state_id": 3}, {"seed": 3}, {"init_state_id": 4}, {"init_state_id": 3}):
        lift_env.reset(**start)
        states.append(lift_env.state())
    np.testing.assert_array_equal(states[0], states[3])
    assert np.abs(states[0] - states[1]).max() > 1e-3
    assert np.abs(states[0] - states[2]).max() > 1e-3
    with pytest.raises(ValueError, match="0 to 49"):
        lift_env.reset(init_state_id=50)


def test_the_expert_lifts_the_pot_with_both_hands(lift_env, episode):
    assert episode.success
    assert episode.goal_fraction == 1.0
    assert episode.length < 130
    assert episode.actions.shape[1:] == (10, 14)
    assert set(episode.images) == set(lift_env.cameras)
    # The grippers close on the way, both of them.
    assert (episode.target_actions[0, 0, [6, 13]] == -1).all()
    assert (episode.target_actions[-1, -1, [6, 13]] == 1).all()


def test_jitter_leaves_the_grippers_alone(episode):
    difference = episode.actions - episode.target_actions
    np.testing.assert_array_equal(difference[..., [6, 13]], 0)
    assert 0.05 < difference[..., :6].std() < 0.25
    assert 0.05 < difference[..., 7:13].std() < 0.25


def test_one_hand_alone_does_not_succeed(lift_env):
    lift_env.reset(seed=1)
    lift_env.max_steps = 90
    for action in expert_actions(lift_env):
        action[7:] = [0, 0, 0, 0, 0, 0, -1]
        lift_env.step(action)
        if lift_env.over:
            break
    assert not lift_env.success
    assert lift_env.goal_fraction < 1
