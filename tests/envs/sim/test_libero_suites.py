"""LIBERO's and LIBERO-PRO's files, and folders of files."""

import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mbpo_jax.envs import suites
from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.sim import libero_suites
from mbpo_jax.envs.sim.libero import LiberoEnv
from mbpo_jax.envs.sim.rollout import run_policy

pytestmark = pytest.mark.libero

LIBERO_PRO = [
    f"libero_{own}_{perturbation}"
    for own in ("spatial", "object", "goal", "10")
    for perturbation in ("swap", "object", "lan", "task")
]


@pytest.mark.parametrize("suite", LIBERO_PRO)
def test_the_perturbed_suites_are_complete(suite):
    assert suites.num_tasks(suite) == 10
    own = libero_suites.unperturbed(suite)
    for task in range(10):
        info, original = suites.task_info(suite, task), suites.task_info(own, task)
        assert info.name == original.name
        assert info.num_init_states == 50
        # What is said changes with the words and with the goal, never with the scene alone.
        changed = info.instruction != original.instruction
        assert changed == suite.endswith(("_lan", "_task"))


def test_a_perturbed_goal_has_the_instruction_of_its_own_file():
    said = suites.task_info("libero_10_task", 2).instruction
    assert said == "turn on the stove and put the pan on it"


@pytest.mark.parametrize(
    ("suite", "lacks"),
    [
        ("libero_10_env", r"10 of its 10 tasks:\n.*bddl_files/libero_10_env/.*\n.*7 tasks more"),
        ("libero_10_with_red_stick", "custom_objects/red_sticker/red_sticker.xml"),
    ],
)
def test_an_incomplete_suite_says_what_is_missing(suite, lacks):
    with pytest.raises(ValueError, match=rf"(?s){suite} is incomplete.*{lacks}"):
        suites.task_info(suite, 0)


def test_a_task_may_have_no_init_states():
    found = [suites.task_info("libero_10_with_milk", i).num_init_states for i in range(10)]
    assert sorted(found) == [0, 0] + [10] * 8


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'libero_10_swap'"):
        suites.num_tasks("libero_10_swop")


def files_of(suite, task, folder, states=None):
    """A folder with the BDDL file of one task, and initial states if they are given."""
    bddl = libero_suites.task_files(suite)[task].bddl
    (folder / "bddl_files").mkdir(parents=True)
    shutil.copy(bddl, folder / "bddl_files")
    if states is not None:
        (folder / "init_files").mkdir()
        np.savez(folder / "init_files" / f"{bddl.stem}.pruned_init.npz", states=states)
    return folder


def test_a_folder_is_a_suite(tmp_path):
    folder = files_of("libero_10_lan", 5, tmp_path / "mine", np.zeros((3, 45)))
    assert suites.num_tasks(str(folder)) == 1
    info = suites.task_info(str(folder), 0)
    assert info.instruction == "pick up the book and place in back compartment"
    assert info.num_init_states == 3
    with pytest.raises(ValueError, match="there is no 1"):
        suites.task_info(str(folder), 1)


def torch_file(path, content):
    """As torch writes an array: a pickle in an archive."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))


def test_torchs_files_are_read_but_run_nothing(tmp_path):
    task = libero_suites.TaskFiles("t", "do it", tmp_path / "t.bddl", tmp_path / "t.pruned_init")
    assert libero_suites.load_init_states(task).shape == (0, 0)
    states = np.random.default_rng(0).normal(size=(4, 9))
    torch_file(task.init_states, states)
    np.testing.assert_array_equal(libero_suites.load_init_states(task), states)
    torch_file(task.init_states, Path("elsewhere"))
    with pytest.raises(ValueError, match=r"t\.pruned_init holds no initial states.*not read"):
        libero_suites.load_init_states(task)
    task.init_states.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no initial states"):
        libero_suites.load_init_states(task)


def test_folders_that_cannot_be_evaluated_say_why(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        suites.num_tasks(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no BDDL file"):
        suites.num_tasks(str(tmp_path))
    name = "pick_it_up_view_0_0_100_0_0_initstate_3"
    (tmp_path / f"{name}.bddl").write_text("(define (:language pick it up))")
    with pytest.raises(ValueError, match=f"1 tasks .*{name}.*LIBERO-Plus"):
        suites.num_tasks(str(tmp_path))


def test_a_perturbed_scene_goes_on_until_its_end(tmp_path):
    suite, task = "libero_10_swap", 5
    states = libero_suites.load_init_states(libero_suites.task_files(suite)[task])
    folder = files_of(suite, task, tmp_path / "right", states)
    env = LiberoEnv(str(folder), 0, image_size=32)
    try:
        env._goals_now = lambda: np.array([env.num_steps == 3])
        request = EpisodeRequest(0, init_state_id=1, max_steps=12, render_every=10, until_end=True)
        result = run_policy(env, request, lambda _: np.zeros((10, 7)), "still")
        assert (result.episode.length, result.first_success) == (12, 3)
        assert not result.episode.success
        env.reset(init_state_id=1)
        book = env.data.xpos[env.simulation.obj_body_id["black_book_1"]]
        # Where the perturbed file puts it: the state is [time, qpos, qvel].
        joint = env.model.body_jntadr[env.simulation.obj_body_id["black_book_1"]]
        address = 1 + env.model.jnt_qposadr[joint]
        np.testing.assert_allclose(book[:2], states[1, address : address + 2], atol=0.01)
        own = libero_suites.load_init_states(libero_suites.task_files("libero_10")[task])
        assert np.abs(own[:, address : address + 2] - book[:2]).max() > 0.05
    finally:
        env.close()


def test_states_of_another_scene_are_refused(tmp_path):
    folder = files_of("libero_10_swap", 5, tmp_path / "wrong", np.zeros((2, 46)))
    with pytest.raises(ValueError, match="are 46 numbers, its scene has 45"):
        LiberoEnv(str(folder), 0, image_size=32)


@pytest.mark.parametrize(
    ("suite", "task", "goals"),
    [
        (
            "libero_10",
            3,
            [
                ("close", "white_cabinet_1_bottom_region"),
                ("in", "akita_black_bowl_1", "white_cabinet_1_bottom_region"),
            ],
        ),
        ("libero_goal", 7, [("turnon", "flat_stove_1")]),
    ],
)
def test_goals_are_read_without_the_simulator(suite, task, goals):
    assert libero_suites.goals(libero_suites.task_files(suite)[task].bddl) == goals
