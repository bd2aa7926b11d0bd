"""Grasps and placements of shapes whose answer is known."""

import numpy as np
import pytest

from mbpo_jax.envs.experts.geometry import (
    opening_axis,
    plan_grasp,
    plan_insertion,
    rotation_about_vertical,
)

NOTHING = np.zeros((0, 3))


def box(size, centre=(0.0, 0.0, 0.0), yaw=0.0):
    """Surface points of a box, 1 cm apart or less."""
    axes = [np.linspace(-s / 2, s / 2, int(np.ceil(s / 0.01)) + 1) for s in size]
    grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 3)
    half = np.array(size) / 2
    surface = grid[(np.abs(np.abs(grid) - half) < 1e-9).any(axis=1)]
    return surface @ rotation_about_vertical(yaw).T + np.array(centre)


@pytest.mark.parametrize("yaw", [-0.7, 0.0, 0.5])
def test_a_thin_box_is_pinched_across_its_thickness(yaw):
    # Thickness along y before turning: at yaw the hand needs to turn by just yaw.
    grasp = plan_grasp(box((0.11, 0.03, 0.13), (0.2, -0.1, 0.9), yaw), NOTHING)
    assert grasp.yaw == pytest.approx(yaw, abs=np.pi / 144)  # half a step of the search
    np.testing.assert_allclose(grasp.position, [0.2, -0.1, 0.9 + 0.065 - 0.03], atol=2e-3)


def test_a_wide_bowl_is_held_by_its_rim_on_the_free_side():
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ring = 0.06 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    bowl = np.concatenate([np.column_stack([ring, np.full(60, z)]) for z in (0.0, 0.03, 0.06)])
    beside = box((0.05, 0.05, 0.1), (0.0, 0.1, 0.05))  # in the way on the side of positive y
    grasp = plan_grasp(bowl, beside)
    assert grasp.position[1] < 0
    assert np.linalg.norm(grasp.position[:2]) == pytest.approx(0.06 - 0.008, abs=1e-3)
    # The fingers open along the radius, so that one is inside and one outside.
    radial = grasp.position[:2] / np.linalg.norm(grasp.position[:2])
    assert abs(radial @ opening_axis(grasp.yaw)) == pytest.approx(1.0, abs=1e-3)


def test_a_retry_takes_another_place_on_the_rim():
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ring = 0.06 * np.stack([np.cos(angle), np.sin(angle), np.ones(60)], axis=1)
    first, second = (plan_grasp(ring, NOTHING, attempt) for attempt in (0, 1))
    assert np.linalg.norm(first.position - second.position) > 0.01


def test_a_box_is_turned_to_fit_a_slot():
    # A slot 5 cm wide in x and 16 cm long in y; the box is 11 cm long in x and 3 cm thick.
    walls = np.concatenate(
        [
            box((0.01, 0.18, 0.1), (0.03, 0, 0.05)),
            box((0.01, 0.18, 0.1), (-0.03, 0, 0.05)),
            box((0.07, 0.01, 0.1), (0, 0.085, 0.05)),
            box((0.07, 0.01, 0.1), (0, -0.085, 0.05)),
        ]
    )
    shape = box((0.11, 0.03, 0.12), yaw=-0.3)
    plan = plan_insertion(shape, -0.3, walls, np.zeros(3), np.array([0.025, 0.08, 0.05]))
    assert plan.yaw == pytest.approx(-np.pi / 2)  # the nearer of the two quarter turns
    np.testing.assert_allclose(plan.spot, [0, 0], atol=0.011)
    # Its lower end is let go 5 cm (at most) below the rim at 0.1, and travels 2.5 cm above it.
    assert plan.height - 0.06 == pytest.approx(0.05)
    assert plan.height - 0.06 + plan.lift == pytest.approx(0.125)
