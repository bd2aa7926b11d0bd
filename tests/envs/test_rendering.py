"""The choice of an OpenGL, and leaving out what a camera cannot see."""

import os

import numpy as np
import pytest

from mbpo_jax.envs import rendering


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
    return monkeypatch


def test_egl_is_preferred_and_osmesa_is_the_fallback(clean_environment):
    works = {"egl": lambda: True, "osmesa": lambda: True}
    clean_environment.setattr(rendering, "BACKENDS", works)
    assert rendering.select_backend() == "egl"
    os.environ["MUJOCO_GL"] = ""
    works["egl"] = lambda: False
    assert rendering.select_backend() == "osmesa"
    assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == "osmesa"


def test_a_backend_that_is_asked_for_is_tried_alone(clean_environment):
    works = {"egl": lambda: True, "osmesa": lambda: False}
    clean_environment.setattr(rendering, "BACKENDS", works)
    os.environ["MUJOCO_GL"] = "osmesa"
    with pytest.raises(RuntimeError, match="MUJOCO_GL=osmesa asks for it"):
        rendering.select_backend()


def test_no_opengl_names_the_packages(clean_environment):
    def missing(*_args, **_keywords):
        raise OSError("cannot open shared object file")

    clean_environment.setattr(rendering.ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match=r"libegl1 libegl-mesa0 libgl1-mesa-dri.*libosmesa6"):
        rendering.select_backend()


@pytest.mark.libero
def test_culling_leaves_out_much_and_changes_no_pixel(book_env):
    book_env.reset(seed=0)
    state = book_env.state()
    culled = book_env.render_state(state)
    culling = book_env._culling
    hidden = [
        1 - culling.visible(book_env.simulation.sim.model.camera_name2id(camera)).mean()
        for camera in book_env.cameras
    ]
    assert min(hidden) > 0.05
    culling._enabled = False
    book_env.model.geom_group[:] = culling._groups
    try:
        whole = book_env.render_state(state)
    finally:
        culling._enabled = True
    for camera in book_env.cameras:
        np.testing.assert_array_equal(culled[camera], whole[camera])
