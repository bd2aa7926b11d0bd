"""Importing as a whole: what is kept, what is refused and how, and stops in between."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("h5py", reason="h5py is not installed: pip install -e '.[import]'")
pytest.importorskip("av", reason="av is not installed: pip install -e '.[import]'")

from configs import libero_long
from experiments.import_data import main
from mbpo_jax import pipeline
from mbpo_jax.data.episodes import read_episodes
from mbpo_jax.stages import import_demonstrations, import_source, read_source
from mbpo_jax.stages.workspace import StageError
from tests.recordings import Truth, write_lerobot, write_libero_hdf5


@pytest.fixture
def config():
    """Of a robot without a simulator."""
    config = libero_long.get_config("micro")
    config.suite = "my_robot"
    config.image_size, config.policy.resize_images = 16, True
    config.chunk = config.policy.chunk = 4
    config.demonstrations.render_every = config.rollouts.render_every = 2
    return config


def run(config, source, workdir, format="lerobot", **options):
    defaults = {"map": [], "skip_bad": False, "dry_run": False, "stage": "demonstrations"}
    defaults |= {"instruction": None, "all_successes": False, "orientation": None, "range": []}
    return main(
        config,
        SimpleNamespace(**(defaults | options), format=format, source=source, workdir=workdir),
    )


def truths():
    made = [Truth(14), Truth(15), Truth(16)]
    made[1].instruction = "close the drawer"
    return made


def test_the_pipeline_finds_the_stage_finished(tmp_path, config, capsys):
    source = write_lerobot(tmp_path / "set", truths())
    run(config, source, tmp_path / "run")
    assert "[0, 0.15]" in capsys.readouterr().out  # the range of the first action dimension
    pipeline.run(config, tmp_path / "run", ["demonstrations"])
    assert "finished before" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["demonstrations"]

    episodes = read_episodes(tmp_path / "run/demonstrations/dataset")
    assert [e.length for e in episodes] == [13, 14, 15]
    assert [e.task_id for e in episodes] == [0, 1, 0]
    assert {e.suite for e in episodes} == {"my_robot"}
    summary = json.loads((tmp_path / "run/demonstrations/done.json").read_text())
    assert summary["episodes"] == 3
    assert summary["control_rate"] == 20
    assert summary["tasks"]["1"] == {
        "instruction": "close the drawer",
        "successes": 1,
        "attempts": 1,
    }
    config.chunk = config.policy.chunk = 2
    with pytest.raises(StageError, match="chunk: 4 there, 2 now"):
        pipeline.run(config, tmp_path / "run", ["demonstrations"])


def test_never_overwrites(tmp_path, config):
    (tmp_path / "run/demonstrations").mkdir(parents=True)
    with pytest.raises(StageError, match="demonstrations exists: delete it"):
        run(config, write_lerobot(tmp_path / "set", truths()), tmp_path / "run")


def test_a_stopped_import_continues(tmp_path, config, monkeypatch):
    source = write_lerobot(tmp_path / "set", truths())
    run(config, source, tmp_path / "uninterrupted")
    convert, converted = read_source.convert, []

    def stop_at_the_third(name, *arguments):
        converted.append(name)
        if len(converted) == 3:
            raise KeyboardInterrupt
        return convert(name, *arguments)

    monkeypatch.setattr(read_source, "convert", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(config, source, tmp_path / "run")
    (unfinished,) = (tmp_path / "run").iterdir()
    assert unfinished.name.startswith(".import-")
    with next(unfinished.rglob("episodes.jsonl")).open("a") as file:
        file.write('[2, {"name": "episode_0000')  # stopped within a line
    run(config, source, tmp_path / "run")
    assert converted == [f"episode_{i:06d}" for i in (0, 1, 2, 2)]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["demonstrations"]
    resumed, whole = (
        read_episodes(tmp_path / name / "demonstrations/dataset")
        for name in ("run", "uninterrupted")
    )
    for a, b in zip(resumed, whole, strict=True):
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b)):
            np.testing.assert_equal(x, y)


def test_a_changed_source_is_read_anew(tmp_path, config, monkeypatch):
    source = write_lerobot(tmp_path / "set", truths(), "v2.1")

    def stop(*arguments):
        raise KeyboardInterrupt

    write = import_demonstrations.write_episodes
    monkeypatch.setattr(import_demonstrations, "write_episodes", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config, source, tmp_path / "run")
    monkeypatch.setattr(import_demonstrations, "write_episodes", write)
    (table,) = source.rglob("episode_000000.parquet")
    table.write_bytes(table.read_bytes()[:-30])
    with pytest.raises(StageError, match=r"episode_000000.*truncated"):
        run(config, source, tmp_path / "run")


def bad_files(directory):
    """Files of one good episode and of episodes bad in every way, with what is said of them."""
    good, nan, short = Truth(), Truth(), Truth(4)
    nan.actions[3:5, 2] = np.nan
    floats = {"obs/agentview_rgb": good.images["agentview"] / 255}
    first = {"obs/eye_in_hand_rgb": np.moveaxis(good.images["agentview"], -1, 1)}
    wrong_size = {"actions": good.actions[:, :6]}
    fewer = {"obs/gripper_states": good.proprio[:9, 6:]}
    cases = {
        "floats": (good, floats, "frames are float64, expected uint8"),
        "first": (good, first, r"frames of shape \(3, 16, 16\) have their channels first"),
        "integers": (good, {"actions": good.actions.astype(int)}, "actions are int64"),
        "nan": (nan, {}, "actions: not finite at 2 rows, first at row 3"),
        "short": (short, {}, "3 steps are shorter than a chunk of 4"),
        "size": (good, wrong_size, "6 actions, the robot libero_panda has 7"),
        "rows": (good, fewer, "obs/ee_states has 14, obs/gripper_states has 9"),
    }
    directory.mkdir()
    for i in range(3):
        write_libero_hdf5(directory / f"good{i}.hdf5", [good])
    for name, (truth, replace, _) in cases.items():
        write_libero_hdf5(directory / f"{name}.hdf5", [truth], **replace)
    mute = Truth()
    mute.instruction = "  "
    write_libero_hdf5(directory / "mute.hdf5", [mute])
    write_libero_hdf5(directory / "fast.hdf5", [good], control_rate=50)
    write_libero_hdf5(directory / "cut.hdf5", [good])
    cut = directory / "cut.hdf5"
    cut.write_bytes(cut.read_bytes()[:-500])
    said = {name: message for name, (_, _, message) in cases.items()}
    return said | {
        "mute": "the instruction is empty",
        "fast": "recorded at 50 Hz, the robot libero_panda acts at 20 Hz",
        "cut": r"cut\.hdf5: .*truncated",
    }


def test_every_problem_is_reported_and_nothing_is_left_behind(tmp_path, config):
    said = bad_files(tmp_path / "set")
    with pytest.raises(StageError, match=f"{len(said)} of 13 episodes are bad") as caught:
        run(config, tmp_path / "set", tmp_path / "run", "libero_hdf5")
    for name, message in said.items():
        caught.match(rf"{name}\.hdf5.*: .*({message})")
    caught.match("--skip_bad")
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(StageError, match=f"{len(said)} of 13 episodes are bad"):
        run(config, tmp_path / "set", tmp_path / "dry", "libero_hdf5", dry_run=True)
    assert not (tmp_path / "dry").exists()


def test_bad_episodes_can_be_skipped(tmp_path, config, capsys):
    said = bad_files(tmp_path / "set")
    run(config, tmp_path / "set", tmp_path / "run", "libero_hdf5", skip_bad=True)
    assert f"13, {len(said)} bad, 3 to be imported" in capsys.readouterr().out
    assert len(read_episodes(tmp_path / "run/demonstrations/dataset")) == 3
    summary = json.loads((tmp_path / "run/demonstrations/done.json").read_text())
    assert {name.split(".")[0] for name in summary["skipped"]} == said.keys()


def test_failures_are_no_demonstrations_but_rollouts(tmp_path, config):
    failed = {"rewards": np.zeros(14)}
    write_libero_hdf5(tmp_path / "won.hdf5", [Truth()])
    source = write_libero_hdf5(tmp_path / "lost.hdf5", [Truth()], **failed)
    run(config, tmp_path, tmp_path / "run", "libero_hdf5")
    (episode,) = read_episodes(tmp_path / "run/demonstrations/dataset")
    assert episode.success
    with pytest.raises(StageError, match=r"nothing is left to import\n(.*\n)*.*1 x failures"):
        run(config, source, tmp_path / "other", "libero_hdf5")
    run(config, tmp_path, tmp_path / "run", "libero_hdf5", stage="rollouts")
    episodes = read_episodes(tmp_path / "run/rollouts/dataset")
    assert sorted(episode.success for episode in episodes) == [False, True]
    summary = json.loads((tmp_path / "run/rollouts/done.json").read_text())
    assert (summary["episodes"], summary["successes"]) == (2, 1)


def test_dry_run_draws_first_frames_and_imports_nothing(tmp_path, config):
    from PIL import Image

    source = write_lerobot(tmp_path / "set", truths())
    text = run(config, source, tmp_path / "dry", dry_run=True)
    for line in (
        "3, 0 bad, 3 to be imported",
        "1 x 'close the drawer'",
        "13 to 15 steps, median 14",
        "3 labelled so, 0 without a label",
        "agentview, 16x16 (height x width)",
        "[0, 0.15] [-0.15, 0] [0, 0]",
        "20 Hz",
    ):
        assert line in text
    (sheet,) = (tmp_path / "dry").iterdir()
    colours = {color for _, color in Image.open(sheet).convert("RGB").getcolors(1 << 24)}
    assert {(0, 0, 200), (255, 255, 55)} <= colours  # blue at first, and its complement


def test_an_import_is_compared_with_the_robot(tmp_path, config):
    good, far, wide = Truth(), Truth(), Truth()
    far.actions = far.actions * 57
    wide.proprio = wide.proprio[:, :7]
    write_libero_hdf5(tmp_path / "good.hdf5", [good])
    write_libero_hdf5(tmp_path / "far.hdf5", [far])
    write_libero_hdf5(tmp_path / "wide.hdf5", [wide])
    write_libero_hdf5(tmp_path / "fast.hdf5", [good], control_rate=30)
    for stage in ("demonstrations", "rollouts"):
        for dry_run in (False, True):
            workdir = tmp_path / f"{stage}{dry_run}"
            with pytest.raises(StageError, match=r"3 of 4 episodes are bad") as caught:
                run(config, tmp_path, workdir, "libero_hdf5", stage=stage, dry_run=dry_run)
            caught.match(r"far\.hdf5:demo_0: x goes from 0 to 7\.41, its limits are -1 and 1")
            caught.match(r"far\.hdf5:demo_0: gripper goes from")
            caught.match(r"wide\.hdf5:demo_0: 7 states, the robot libero_panda has 8")
            caught.match(r"fast\.hdf5:demo_0: .*30 Hz.* 20 Hz.*1\.5 rows")
            assert not workdir.exists() or list(workdir.iterdir()) == []


def test_a_gripper_of_another_convention(tmp_path, config, capsys):
    truth = Truth()
    truth.actions[:, :6] = np.linspace(-1, 1, 14)[:, None]
    truth.actions[:, 6] = np.arange(14) > 6
    source = write_libero_hdf5(tmp_path / "a.hdf5", [truth])
    text = run(config, source, tmp_path / "dry", "libero_hdf5", dry_run=True)
    (warning,) = [line for line in text.splitlines() if "warning" in line and "limits" in line]
    assert "gripper takes values from 0 to 1 only, its limits are -1 and 1" in warning
    for given, first, last in (("0:1", -1, 1), ("1:0", 1, -1)):
        ranges = [f"gripper={given}"]
        workdir = tmp_path / given
        run(config, source, workdir, "libero_hdf5", range=ranges)
        assert "limits" not in capsys.readouterr().out
        (episode,) = read_episodes(workdir / "demonstrations/dataset")
        assert episode.actions[[0, -1], 0, 6].tolist() == [first, last]
        assert episode.target_actions[[0, -1], 0, 6].tolist() == [first, last]
        np.testing.assert_allclose(episode.actions[0, 0, :6], -1)


@pytest.mark.parametrize(
    "text", ["grip=0:1", "gripper=0", "gripper=0:0", "gripper=a:b", "0:1", "x=0:1 x=0:2"]
)
def test_a_range_of_nothing(tmp_path, config, text):
    source = write_libero_hdf5(tmp_path / "a.hdf5", [Truth()])
    with pytest.raises((StageError, ValueError), match="range"):
        run(config, source, tmp_path / "run", "libero_hdf5", range=text.split())
    assert not (tmp_path / "run").exists()


def test_suspiciously_small_actions_are_told(tmp_path, config):
    truth = Truth()
    source = write_libero_hdf5(tmp_path / "a.hdf5", [truth], actions=truth.actions / 100)
    text = run(config, source, tmp_path / "dry", "libero_hdf5", dry_run=True)
    told = [line.split()[1] for line in text.splitlines() if "limits" in line]
    assert told == ["x", "y", "gripper"]


def test_an_instruction_above_the_budgets(tmp_path, config, capsys):
    long = Truth()
    long.instruction = "put the zyxwv into the qponm" * 3
    (tmp_path / "set").mkdir()
    write_libero_hdf5(tmp_path / "set/a.hdf5", [Truth(), Truth()])
    write_libero_hdf5(tmp_path / "set/b.hdf5", [long])
    text = run(config, tmp_path / "set", tmp_path / "dry", "libero_hdf5", dry_run=True)
    warned = [line for line in text.splitlines() if "max_prompt_tokens" in line]
    assert len(warned) == 2
    for line, entry in zip(warned, ("policy", "world_model"), strict=True):
        assert "b.hdf5:demo_0" in line
        assert f"--config.{entry}.max_prompt_tokens" in line

    run(config, tmp_path / "set", tmp_path / "run", "libero_hdf5")
    with pytest.raises(StageError, match=r"episode 2.*--config\.policy\.max_prompt_tokens"):
        pipeline.run(config, tmp_path / "run", ["sft"])
    # Another budget may be tried in the same folder.
    assert not (tmp_path / "run/sft/config.json").exists()


def test_labels_that_deny_success_are_named(tmp_path, config):
    source = write_libero_hdf5(tmp_path / "a.hdf5", [Truth(), Truth()], rewards=np.zeros(14))
    with pytest.raises(StageError, match=r"rewards is 0.* all 2 ") as caught:
        run(config, source, tmp_path / "run", "libero_hdf5")
    for option in ("--all_successes", "--map=KEY=success", "--stage=rollouts"):
        caught.match(option)
    run(config, source, tmp_path / "run", "libero_hdf5", all_successes=True)
    episodes = read_episodes(tmp_path / "run/demonstrations/dataset")
    assert [episode.success for episode in episodes] == [True, True]
    write_libero_hdf5(tmp_path / "won.hdf5", [Truth()], rewards=np.eye(14)[-3])
    text = run(config, tmp_path, tmp_path / "dry", "libero_hdf5", dry_run=True)
    assert "rewards is 0 at every row of 2 of 3 labelled episodes (a.hdf5:demo_0, a" in text
    assert "won.hdf5:demo_0: rewards is 1 at row 11 and 0 again at row 12" in text


def test_what_is_no_problem_of_the_source_leaves_nothing_behind_either(
    tmp_path, config, monkeypatch
):
    source = write_libero_hdf5(tmp_path / "a.hdf5", [Truth()])

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(import_demonstrations, "write_episodes", full)
    with pytest.raises(OSError, match="no space left"):
        run(config, source, tmp_path / "run", "libero_hdf5")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.libero
def test_only_the_tasks_of_the_config(tmp_path, config):
    pytest.importorskip("libero", reason="the simulator is not installed (extra: libero)")
    config.suite = "libero_10"
    made = truths()
    made[0].instruction = made[0].instruction.capitalize()
    source = write_lerobot(tmp_path / "set", made)
    text = run(config, source, tmp_path / "dry", dry_run=True)
    assert "1 x 'close the drawer': not among the config's tasks" in text
    run(config, source, tmp_path / "run")
    episodes = read_episodes(tmp_path / "run/demonstrations/dataset")
    assert [e.task_id for e in episodes] == [5, 5]


def test_not_a_dataset(tmp_path, config):
    for format in import_source.FORMATS:
        with pytest.raises(StageError, match=r"is not an? .*dataset"):
            run(config, tmp_path, tmp_path / "run", format)
        with pytest.raises(StageError, match="there is nothing at"):
            run(config, tmp_path / "absent", tmp_path / "run", format)
    assert not (tmp_path / "run").exists()
