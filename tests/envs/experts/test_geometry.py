"""Grasps and placements of shapes whose answer is known."""

import numpy as np
import pytest

from mbpo_jax.envs.experts.geometry import (
    clear_spot,
    find_mouth,
    leaning,
    opening_axis,
    plan_grasp,
    plan_handle_grasp,
    plan_insertion,
    rotation_about_vertical,
    yaw_along,
)
from mbpo_jax.envs.experts.motion import DOWN

NOTHING = np.zeros((0, 3))
ABOVE = np.array([[0.0, 0.0, 1.0]])  # a palm that touches nothing


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
    half = np.array([0.025, 0.08, 0.05])
    plan = plan_insertion(shape, ABOVE, -0.3, walls, 0.1, np.zeros(3), half)
    assert plan.yaw == pytest.approx(-np.pi / 2)  # the nearer of the two quarter turns
    np.testing.assert_allclose(plan.spot, [0, 0], atol=0.011)
    # Its lower end is let go 5 cm (at most) below the rim at 0.1, and travels 2.5 cm above it.
    assert plan.height - 0.06 == pytest.approx(0.05)
    assert plan.height - 0.06 + plan.lift == pytest.approx(0.125)


def test_a_drawer_is_filled_where_the_hand_clears_what_is_above_it():
    # The drawer's rim is at 0.1; over its back half (y > 0) the cabinet goes up to 0.4. Held by the
    # side away from it, the object has room for a palm of 8 cm only from y = -0.04 - 0.012 on.
    drawer = box((0.24, 0.2, 0.1), (0, 0, 0.05))
    drawer = drawer[(drawer[:, 2] < 0.1) | (np.abs(drawer[:, :2]) > [0.119, 0.099]).any(axis=1)]
    cabinet = box((0.24, 0.01, 0.3), (0, 0.005, 0.25))
    shape, palm = box((0.04, 0.04, 0.06)), box((0.08, 0.08, 0.06), (0, 0, 0.1))
    half = np.array([0.1, 0.08, 0.05])
    walls = np.concatenate([drawer, cabinet])
    plan = plan_insertion(shape, palm, 0.0, walls, 0.1, np.zeros(3), half)
    assert plan.spot[1] == pytest.approx(-0.052, abs=0.007)  # a step of the search
    assert plan.height == pytest.approx(0.1 - 0.03 + 0.03)  # its lower end 3 cm below the rim
    alone = plan_insertion(shape, ABOVE, 0.0, walls, 0.1, np.zeros(3), half)
    assert alone.spot[1] == pytest.approx(-0.032, abs=0.007)


def test_what_falls_to_the_floor_has_as_much_room_on_either_side_there():
    # A bowl, 4 cm wide for its lower 3 cm and 10 cm above, between a drawer's front (up to the rim
    # at 0.1) and the cabinet over it: 10.4 cm from y = -0.054 to 0.05. Let go, its lower end alone
    # would be below the rim; on the floor all of it is, with 2 mm at each wall.
    front, cabinet = (
        box((0.3, 0.01, 0.1), (0, -0.059, 0.05)),
        box((0.3, 0.01, 0.3), (0, 0.055, 0.26)),
    )
    bowl = np.concatenate(
        [box((0.04, 0.04, 0.02), (0, 0, -0.02)), box((0.1, 0.1, 0.03), (0, 0, 0.015))]
    )
    half = np.array([0.1, 0.08, 0.05])
    walls = np.concatenate([front, cabinet])
    plan = plan_insertion(bowl, ABOVE, 0.0, walls, 0.1, np.zeros(3), half)
    assert plan.spot[1] == pytest.approx(-0.002, abs=0.0035)  # half a step of the search
    assert plan.height == pytest.approx(0.1 - 0.03 + 0.03)


def oven(turned):
    """A box that is open towards -y before it is turned, its middle 3 cm beside the region's."""
    walls = np.concatenate(
        [
            box((0.01, 0.2, 0.2), (0.13, 0, 0)),
            box((0.01, 0.2, 0.2), (-0.07, 0, 0)),
            box((0.2, 0.01, 0.2), (0.03, 0.1, 0)),
            box((0.2, 0.2, 0.01), (0.03, 0, 0.1)),
            box((0.2, 0.2, 0.01), (0.03, 0, -0.1)),
        ]
    )
    return walls @ rotation_about_vertical(turned).T


def test_what_an_open_drawer_would_cover_is_set_aside():
    # A drawer 20 cm wide that opens along y; open, its front is at y = 0.
    x, y = np.meshgrid(np.linspace(-0.1, 0.1, 21), np.linspace(-0.2, 0.0, 21))
    drawer = np.column_stack([x.ravel(), y.ravel(), np.full(x.size, 0.2)])
    outward, nothing = np.array([0.0, 1.0, 0.0]), np.zeros((0, 3))
    below = np.array([0.05, -0.02, 0.0])
    np.testing.assert_allclose(clear_spot(below, drawer, outward, nothing), [0.05, 0.1], atol=1e-9)
    assert clear_spot(below + [0, 0.121, 0], drawer, outward, nothing) is None  # before it
    assert clear_spot(below + [0.16, 0, 0], drawer, outward, nothing) is None  # beside it
    cup = np.array([[0.05, 0.1, 0.0]])
    found = clear_spot(below, drawer, outward, cup)
    assert np.linalg.norm(found - cup[0, :2]) == pytest.approx(0.09)
    assert found[1] >= 0.1


@pytest.mark.parametrize("turned", [0.0, np.pi / 2, np.pi, -np.pi / 2])
def test_the_mouth_of_a_covered_region_is_where_it_is_open(turned):
    half, there = np.array([0.14, 0.14, 0.08]), np.array([0.5, 0.2, 1.0])
    mouth = find_mouth(oven(turned) + there, there, half)
    turn = rotation_about_vertical(turned)
    np.testing.assert_allclose(mouth.outward, turn @ [0, -1, 0], atol=1e-9)
    np.testing.assert_allclose(mouth.middle, there + turn @ [0.03, 0, 0], atol=1e-9)


def test_a_region_that_is_open_above_has_no_mouth():
    walls = oven(0.0)
    assert find_mouth(walls[walls[:, 2] < 0.09], np.zeros(3), np.full(3, 0.08)) is None


def test_a_mug_is_held_by_its_handle():
    mug = np.concatenate([box((0.1, 0.1, 0.1)), box((0.02, 0.04, 0.06), (0.01, -0.07, 0.01))])
    held = plan_handle_grasp(mug, np.array([0.0, -1.0, 0.0]))
    np.testing.assert_allclose(held, [0.01, -0.09 + 0.015, 0.01], atol=1e-9)


@pytest.mark.parametrize("angle", [-2.0, -0.4, 0.0, 0.4, 1.5, 3.0])
def test_fingers_open_along_a_direction(angle):
    direction = np.array([np.cos(angle), np.sin(angle), 0.0])
    yaw = yaw_along(direction)
    assert abs(yaw) <= np.pi / 2
    assert abs(opening_axis(yaw) @ direction[:2]) == pytest.approx(1)


def test_a_hand_that_leans_points_the_other_way():
    towards = np.array([0.0, 1.0, 0.0])
    pointing = leaning(DOWN, towards, 0.3)[:, 2]
    np.testing.assert_allclose(pointing, [0, -np.sin(0.3), -np.cos(0.3)], atol=1e-9)
    np.testing.assert_allclose(leaning(DOWN, towards, np.pi / 2)[:, 0], [0, 0, -1], atol=1e-9)
