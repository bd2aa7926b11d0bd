import json
import tarfile

import numpy as np
import pytest

from configs import libero_long
from experiments import pack, unpack
from mbpo_jax import pipeline
from mbpo_jax.data.episodes import read_episodes, write_episodes
from mbpo_jax.episode import Episode
from mbpo_jax.stages.workspace import Workspace


def episode(seed, frames=3):
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, 16, dtype=np.uint8)
    moving = np.stack([ramp // (frame + 1) for frame in range(frames)])
    images = {
        camera: np.tile(moving[:, :, None, None], (1, 1, 16, 3)) + np.uint8(10 * i + seed)
        for i, camera in enumerate(("agentview", "robot0_eye_in_hand"))
    }
    return Episode(
        suite="libero_10",
        task_id=5,
        instruction="pick up the book",
        source="expert",
        seed=seed,
        init_state_id=-1,
        success=bool(seed % 2),
        length=10 * (frames - 1),
        goal_fraction=1 / 3,
        timesteps=10 * np.arange(frames, dtype=np.int32),
        images=images,
        proprio=rng.normal(size=(frames, 8)).astype(np.float32),
        actions=rng.uniform(-1, 1, (frames, 10, 7)).astype(np.float32),
        target_actions=rng.uniform(-1, 1, (frames, 10, 7)).astype(np.float32),
        num_actions=np.array([10] * (frames - 1) + [0], np.int32),
    )


@pytest.fixture
def workdir(tmp_path):
    """All that stage `improve` reads, and what it does not."""
    workspace = Workspace(tmp_path / "run", libero_long.get_config("tiny"))
    for name in ("demonstrations", "sft", "rollouts", "world_model", "value"):
        folder = workspace.begin(name, pipeline._sections_up_to(workspace.config, name))
        if name in ("demonstrations", "rollouts"):
            first = 10 * (name == "rollouts")
            write_episodes(folder / "dataset", (episode(first + i) for i in range(2)))
        for part in pack.NEEDS["improve"][name]:
            path = folder / part
            if part.endswith(".json"):
                path.write_text('{"norm_stats": {}}')
            elif part != "dataset":
                (path / "d").mkdir(parents=True)
                (path / "d" / "array").write_bytes(np.random.default_rng(0).bytes(999))
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "state").write_bytes(bytes(10**6))
        workspace.finish(name, {"minutes": 1 / 3})
    return workspace.root


def run(module, *arguments):
    return module.main([str(argument) for argument in arguments])


@pytest.fixture
def archive(workdir, tmp_path):
    path = tmp_path / "improve.tar"
    assert run(pack, f"--workdir={workdir}", "--for=improve", f"--out={path}") == 0
    return path


def test_a_round_trip_changes_nothing_but_pixels(workdir, archive, tmp_path, capsys):
    back = tmp_path / "back"
    assert run(unpack, archive, f"--workdir={back}") == 0
    assert "--stages=improve" in capsys.readouterr().out
    assert archive.stat().st_size < 10**6
    files = {str(p.relative_to(back)) for p in back.rglob("*") if p.is_file()}
    assert not [name for name in files if "checkpoints" in name]
    for name in files:
        if "dataset" not in name:
            assert (back / name).read_bytes() == (workdir / name).read_bytes()
    for name, needed in pack.NEEDS["improve"].items():
        for part in ("config.json", "done.json", *needed):
            assert (back / name / part).exists()

    for name in ("demonstrations", "rollouts"):
        before, after = (read_episodes(root / name / "dataset") for root in (workdir, back))
        assert len(before) == len(after) == 2
        for a, b in zip(before, after):
            left, right = vars(a).copy(), vars(b).copy()
            images, changed = left.pop("images"), right.pop("images")
            np.testing.assert_equal(right, left)
            assert list(images) == list(changed)
            for camera, frames in images.items():
                assert changed[camera].dtype == np.uint8
                assert np.abs(frames.astype(int) - changed[camera]).max() < 20

    # The pipeline takes it for the run: what is finished is, and the config is the same.
    workspace = Workspace(back, libero_long.get_config("tiny"))
    pipeline._check_finished(workspace)
    assert workspace.require("value") == {"minutes": 1 / 3}
    assert workspace.summary("improve") is None


def test_packing_tells_the_error_of_the_frames(workdir, tmp_path, capsys):
    psnr = {}
    for quality in (10, 50, 100):
        out = tmp_path / f"{quality}.tar"
        found = pack.pack(workdir, ["world_model"], out, quality)
        assert found["rollouts"]["episodes"] == 2
        assert found["rollouts"]["frames"] == 12
        psnr[quality] = found["rollouts"]["psnr"]
        with tarfile.open(out) as opened:
            assert not [name for name in opened.getnames() if "sft/policy" in name]
            assert "sft/config.json" in opened.getnames()
    assert psnr[10] < psnr[50] < psnr[100]
    out = tmp_path / "again.tar"
    assert run(pack, f"--workdir={workdir}", "--for=world_model", f"--out={out}") == 0
    assert f"rollouts: 2 episodes, 12 frames, PSNR {psnr[50]:.1f} dB" in capsys.readouterr().out


def test_several_stages_take_what_none_of_them_writes(workdir, tmp_path, capsys):
    out = tmp_path / "several.tar"
    stages = "world_model,value,improve"
    assert run(pack, f"--workdir={workdir}", f"--for={stages}", f"--out={out}") == 0
    with tarfile.open(out) as opened:
        names = opened.getnames()
    assert {name.split("/")[0] for name in names} == {
        *("demonstrations", "sft", "rollouts"),
        "pack.json",
    }
    assert "sft/policy/d/array" in names
    assert run(unpack, out, f"--workdir={tmp_path / 'there'}") == 0
    assert f"--stages={stages}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(pack, f"--workdir={workdir}", "--for=improve,valeu", f"--out={tmp_path / 'a.tar'}")
    assert "'valeu'" in capsys.readouterr().err


def test_every_stage_can_be_packed_for():
    stages = {**pipeline.STAGES, **pipeline.ROBOT_STAGES}
    assert set(pack.NEEDS) == set(stages) - {"demonstrations"}
    order = ["demonstrations", *pack.NEEDS]
    for stage, needs in pack.NEEDS.items():
        assert all(order.index(name) < order.index(stage) for name in needs)


def test_what_cannot_be_packed(workdir, archive, tmp_path, capsys):
    cases = [
        (workdir, "evaluate", tmp_path / "a.tar", "the stage 'improve' has not finished"),
        (tmp_path / "nothing", "improve", tmp_path / "a.tar", "no working directory"),
        (workdir, "improve", archive, "already exists"),
    ]
    for source, stage, out, message in cases:
        arguments = [f"--workdir={source}", f"--for={stage}", f"--out={out}"]
        assert run(pack, *arguments) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.tar").exists()
    assert not list(tmp_path.glob("*.unfinished"))


def test_what_cannot_be_unpacked(archive, tmp_path, capsys):
    there = tmp_path / "there"
    there.mkdir()
    content = archive.read_bytes()
    damaged = bytearray(content)
    damaged[content.index(b'norm_stats"') + 2] ^= 1  # in a file's content
    cases = {
        "cut.tar": content[: len(content) // 2],
        "damaged.tar": bytes(damaged),
        "other.tar": b"no archive",
    }
    for name, bad in cases.items():
        (tmp_path / name).write_bytes(bad)
        assert run(unpack, tmp_path / name, f"--workdir={tmp_path / 'back'}") == 1
        error = capsys.readouterr().err
        assert "damaged" in error
        assert error.count("\n") == 1
    assert run(unpack, archive, f"--workdir={there}") == 1
    assert "already exists" in capsys.readouterr().err
    assert run(unpack, tmp_path / "missing.tar", f"--workdir={tmp_path / 'back'}") == 1
    assert "there is no file" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_file_outside_the_working_directory_is_refused(tmp_path, capsys):
    index = json.dumps({"stage": "improve", "files": {"../evil": "00"}}).encode()
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        pack._add(archive, "pack.json", index)
    assert run(unpack, path, f"--workdir={tmp_path / 'back'}") == 1
    assert "outside the working directory" in capsys.readouterr().err
