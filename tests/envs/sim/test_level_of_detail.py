"""Coarser meshes: how far a surface moves, and what stays as it was."""

import numpy as np
import pytest

from mbpo_jax.envs.sim.level_of_detail import decimate
from mbpo_jax.envs.sim.libero import LiberoEnv


def grid(n, height):
    """A square of 1 m at a height function of x and y, of n x n cells of two faces."""
    x, y = (axis.ravel() for axis in np.meshgrid(*2 * [np.linspace(0, 1, n + 1)], indexing="ij"))
    index = np.arange((n + 1) ** 2).reshape(n + 1, n + 1)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    faces = [np.stack(face, axis=-1).reshape(-1, 3) for face in ((a, b, c), (a, c, d))]
    return np.stack([x, y, height(x, y)], axis=1), np.concatenate(faces)


def whole(faces):
    a, b, c = faces.T
    return faces[(a != b) & (b != c) & (c != a)]


def test_a_flat_square_keeps_one_vertex_of_a_wide_cell():
    # Cells are 2, 4 and 8 errors wide; 64 columns of vertices fall into 8 cells of 8, the 65th
    # (its edge) into a ninth.
    vertices, faces = grid(64, lambda x, y: 0 * x)
    error = 1 / 64
    assert len(np.unique(decimate(vertices, faces, error))) == 81


def test_a_surface_moves_by_no_more_than_a_cell():
    vertices, faces = grid(64, lambda x, y: 0.3 * np.sin(5 * x))
    error = 0.01
    result = decimate(vertices, faces, error)
    moved = vertices[result] - vertices[faces]
    assert len(whole(result)) < 0.35 * len(faces)
    assert np.abs(moved).max() < 8 * error
    # Off the surface it is an error, or the diagonal of a cell of two where it is curved.
    x, _, z = vertices[result].mean(axis=1).T
    assert np.abs(z - 0.3 * np.sin(5 * x)).max() < 2 * np.sqrt(3) * error


def test_a_rough_surface_keeps_a_vertex_of_every_narrow_cell():
    # Heights are 4.5 and 7.5 errors, in one wide cell (4 to 8) but not flat. Narrow ones have 2
    # columns.
    error = 1 / 64
    wave = grid(64, lambda x, y: 1.5 * np.cos(64 * np.pi * x) * np.cos(64 * np.pi * y))
    rough = wave[0] * [1, 1, error] + [0, 0, 6 * error], wave[1]
    assert len(np.unique(decimate(*rough, error))) >= 33**2


def test_the_two_sides_of_a_thin_wall_stay_apart():
    above, faces = grid(32, lambda x, y: 0 * x + 0.501)
    below = above - [0, 0, 1e-3]
    vertices = np.concatenate([above, below])
    both = np.concatenate([faces, faces[:, ::-1] + len(above)])
    sides = decimate(vertices, both, 0.05) >= len(above)
    np.testing.assert_array_equal(sides[: len(faces)], False)
    np.testing.assert_array_equal(sides[len(faces) :], True)


def test_vertices_in_one_place_are_merged_alike():
    vertices, faces = grid(16, lambda x, y: x * y)
    twice = np.concatenate([vertices, vertices])
    halves = faces + len(vertices) * (np.arange(len(faces)) % 2)[:, None]
    np.testing.assert_array_equal(
        twice[decimate(twice, halves, 0.02)], vertices[decimate(vertices, faces, 0.02)]
    )


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.libero
def test_small_frames_are_nearly_and_large_ones_exactly_those_of_the_full_meshes(book_env):
    book_env.reset(seed=0)
    state = book_env.state()
    for size in (64, 144, 64):
        drawn = book_env.render_state(state, size)
        book_env.detail.enabled = False
        full = book_env.render_state(state, size)
        book_env.detail.enabled = True
        for camera in book_env.cameras:
            if size == 144:
                np.testing.assert_array_equal(drawn[camera], full[camera])
            else:
                assert 34 < psnr(drawn[camera], full[camera]) < 60


@pytest.mark.libero
def test_the_model_and_what_happens_do_not_depend_on_the_size_of_the_frames(book_env):
    exact = LiberoEnv("libero_10", 5, image_size=144)
    runs = []
    for env in (book_env, exact):
        actions = np.random.default_rng(0)
        env.reset(init_state_id=0)
        states = []
        for _ in range(10):
            env.step(actions.uniform(-1, 1, 7))
            env.observe()
            states.append([*env.state(), env.success, *env.proprio()])
        runs.append(np.array(states))
    try:
        np.testing.assert_array_equal(*runs)
        for name in ("face", "facenum", "facenormal", "facetexcoord", "vert", "normal", "graph"):
            pair = [getattr(env.model, f"mesh_{name}") for env in (book_env, exact)]
            np.testing.assert_array_equal(*pair)
    finally:
        exact.close()
