"""The choice of an OpenGL, and leaving out what a camera cannot see."""

import os
import subprocess
import sys

import numpy as np
import pytest

from mbpo_jax.envs.sim import rendering
from mbpo_jax.envs.sim.culling import FrustumCulling
from mbpo_jax.envs.sim.libero import LiberoEnv


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", rendering.DEVICE, "CUDA_VISIBLE_DEVICES"):
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


def with_devices(environment, *works):
    """As if EGL had devices that work or not; `works` is called in the order of the numbers."""
    devices = [lambda answer=answer: answer for answer in works]
    environment.setattr(rendering, "egl_devices", lambda: devices)


@pytest.mark.parametrize(
    ("visible", "works", "device"),
    [
        ("", (True,), "0"),
        ("-1", (True,), "0"),
        ("3", (True,), "0"),
        ("GPU-8f5d7b2e-0000-1111-2222-333344445555", (False, True), "1"),
        ("MIG-GPU-8f5d7b2e/1/0", (True,), "0"),
        ("NoDevFiles", (True,), "0"),
        ("1", (True, True), "1"),
        (" 2 , 0", (True, True, True), "2"),
        ("2,0", (True, True), "0"),
        ("1", (True, False), "0"),
    ],
)
def test_every_form_of_cuda_visible_devices_renders(clean_environment, visible, works, device):
    with_devices(clean_environment, *works)
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    assert rendering.select_backend() == "egl"
    assert os.environ[rendering.DEVICE] == device
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize("asked", ["2", "1", "-1", "gpu", "0,1", "GPU-8f5d7b2e", "0.0"])
def test_an_egl_device_that_is_not_there_is_named(clean_environment, asked):
    with_devices(clean_environment, True, False)
    os.environ.update({rendering.DEVICE: asked, "CUDA_VISIBLE_DEVICES": "0,1"})
    with pytest.raises(RuntimeError, match=f"MUJOCO_EGL_DEVICE_ID={asked} .* are 2,"):
        rendering.select_backend()


def test_an_egl_device_that_is_there_is_taken(clean_environment):
    with_devices(clean_environment, True, True, True)
    os.environ.update({rendering.DEVICE: " 2", "CUDA_VISIBLE_DEVICES": "0,1"})
    assert rendering.select_backend() == "egl"
    assert os.environ[rendering.DEVICE] == "2"


def test_without_egl_its_variables_do_not_matter(clean_environment):
    with_devices(clean_environment)
    clean_environment.setitem(rendering.BACKENDS, "osmesa", lambda: True)
    os.environ.update({rendering.DEVICE: "7", "CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert rendering.select_backend() == "osmesa"


@pytest.mark.libero
@pytest.mark.parametrize("visible", ["", "GPU-8f5d7b2e-0000-1111-2222-333344445555", "77"])
def test_the_simulators_renderer_takes_the_device_that_was_found(visible):
    program = (
        "from mbpo_jax.envs.sim import simulator; simulator.prepare_robosuite();"
        "from robosuite.utils.binding_utils import GLContext; GLContext(8, 8, device_id=-1);"
        "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    environment.pop(rendering.DEVICE, None)
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == visible


def test_no_opengl_names_the_packages(clean_environment):
    def missing(*_args, **_keywords):
        raise OSError("cannot open shared object file")

    clean_environment.setattr(rendering.ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match=r"libegl1 libegl-mesa0 libgl1-mesa-dri.*libosmesa6"):
        rendering.select_backend()


@pytest.fixture(scope="module")
def stove_env():
    """A scene with a stove, whose top is a mirror."""
    env = LiberoEnv("libero_goal", 7, image_size=64)
    env.reset(seed=0)
    yield env
    env.close()


def frames(env, state, size, culled, decimated):
    env.culling.enabled, env.detail.enabled = culled, decimated
    try:
        return env.render_state(state, size)
    finally:
        env.culling.enabled = env.detail.enabled = True


@pytest.mark.libero
@pytest.mark.parametrize("scene", ["book_env", "stove_env"])
def test_culling_leaves_out_much_and_changes_no_pixel(scene, request):
    env = request.getfixturevalue(scene)
    env.reset(seed=0)
    state = env.state()
    culled = frames(env, state, 144, culled=True, decimated=True)
    groups = env.model.geom_group.copy()
    for camera in env.cameras:
        with env.culling.view_of(env.simulation.sim.model.camera_name2id(camera)):
            assert (env.model.geom_group != groups).mean() > 0.01
    np.testing.assert_array_equal(env.model.geom_group, groups)
    whole = frames(env, state, 144, culled=False, decimated=False)
    for camera in env.cameras:
        np.testing.assert_array_equal(culled[camera], whole[camera])


class Mirrored:
    """A camera at (0, 0, 1) that looks along +x with a view of 90 degrees; a mirror box on the
    floor whose upper face is at height 0; small boxes where they are put."""

    def __init__(self, *places):
        count = 1 + len(places)
        self.geom_group = np.zeros(count, int)
        self.geom_aabb = np.tile([0, 0, 0, 0.1, 0.1, 0.1], (count, 1))
        self.geom_size = np.full((count, 3), 0.1)
        self.geom_type = np.full(count, 6)
        self.geom_matid = np.array([0] + [-1] * len(places))
        self.mat_reflectance = np.array([0.5])
        self.light_castshadow = np.zeros(1)
        self.cam_fovy = [90]
        self.geom_xmat = np.tile(np.eye(3).ravel(), (count, 1))
        self.geom_xpos = np.array([[2, 0, -0.1], *places], float)
        self.cam_xpos = np.array([[0, 0, 1]])
        self.cam_xmat = np.array([[0, 0, -1, -1, 0, 0, 0, 1, 0]], float)


def test_what_is_seen_in_a_mirror_alone_is_drawn():
    # At x = 2 the view ends at height 3; the image of height 4 is at -4, that of 1.9 at -1.9
    # (the view's lower end is -1), and that of 2.5 at x = 4 is at -2.5, above -3.
    scene = Mirrored([2, 0, 1], [2, 0, 4], [4, 0, 5.5], [2, 4, 1], [-2, 0, 1])
    culling = FrustumCulling(scene, scene)
    np.testing.assert_array_equal(culling.visible(0), [True, True, False, False, False, False])
    scene.geom_xpos[1:4] = [1.5, 0, 3], [4, 0, 5.3], [4, 0, 2.5]
    np.testing.assert_array_equal(culling.visible(0)[1:4], [False, False, True])
    # A mirror turned upright, its face at x = 1.9 to the camera: what is behind the camera shows.
    scene.geom_xmat[0] = [0, 0, -1, 0, 1, 0, 1, 0, 0]
    assert culling.visible(0)[5]
    # Its image is at x = 5.8, where the view ends at y = 5.9 and, against rounding, at 6.02.
    for y, seen in ((6.0, True), (6.22, False)):
        scene.geom_xpos[5] = [-2, y, 1]
        assert culling.visible(0)[5] == seen
    scene.geom_xpos[5] = [-2, 0, 1]
    scene.geom_type[0] = 7
    assert not FrustumCulling(scene, scene).visible(0)[5]  # a mesh is no mirror
