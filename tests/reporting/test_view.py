import base64
import io
import json
import re

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from experiments.view import main
from mbpo_jax.data.episodes import write_episodes
from mbpo_jax.episode import Episode
from mbpo_jax.reporting import view
from mbpo_jax.stages.workspace import StageError, Workspace
from mbpo_jax.toy import ToyPolicy
from mbpo_jax.types import WorldState

TIMES = [0, 2, 4, 5]  # two whole chunks, and one that ended early without success
CAMERAS = ("top", "hand")


class Brightening:
    """A world that gets 10 grey levels brighter with every chunk; done is how bright it is."""

    def encode(self, params, observation, key, precomputed=None):
        return WorldState(observation)

    def step(self, params, state, actions, key):
        images = {c: x + 10 for c, x in state.observation.images.items()}
        return WorldState(state.observation.replace(images=images))

    def success_probability(self, params, state):
        return jnp.asarray(state.observation.images["top"]).mean((1, 2, 3)) / 255


@pytest.fixture
def workspace(tmp_path):
    rng = np.random.default_rng(0)
    chunks = rng.uniform(-1, 1, (len(TIMES), 2, 1)).astype(np.float32)
    episode = Episode(
        suite="libero_10",
        task_id=5,
        instruction="pick up the book </script>",
        source="sft",
        seed=0,
        init_state_id=-1,
        success=False,
        length=TIMES[-1],
        goal_fraction=0.0,
        timesteps=np.array(TIMES, np.int32),
        images={c: rng.integers(0, 200, (len(TIMES), 4, 4, 3), np.uint8) for c in CAMERAS},
        proprio=rng.normal(size=(len(TIMES), 3)).astype(np.float32),
        actions=chunks,
        target_actions=chunks,
        num_actions=np.array([2, 2, 1, 0], np.int32),
    )
    config = ml_collections.ConfigDict(
        {
            "cameras": CAMERAS,
            "chunk": 2,
            "seed": 0,
            "pretrained": {"policy_tokenizer": "", "world_tokenizer": ""},
            "policy": {"max_prompt_tokens": 32},
            "world_model": {"max_prompt_tokens": 32},
            "rl": {"branch_chunks": 2, "reward_threshold": 0.9},
        }
    )
    workspace = Workspace(tmp_path, config)
    workspace.begin("rollouts", list(config))
    write_episodes(tmp_path / "rollouts/dataset", [episode])
    return workspace, episode


@pytest.fixture
def trained(workspace, monkeypatch):
    """The same after the stages that train, with toys for what they would have left."""
    for stage in ("world_model", "improve"):
        workspace[0].directory(stage).mkdir()
        workspace[0].finish(stage, {})
    params = ToyPolicy().init()
    params["critic"]["w"] = np.array([1.0, 2.0], np.float32)
    monkeypatch.setattr(view, "load_world_model", lambda *_: (Brightening(), {}))
    monkeypatch.setattr(view, "_improved", lambda workspace: (ToyPolicy(), params))
    return workspace


def test_an_episode_is_seen_before_anything_is_trained(workspace):
    clip = view.episode_clip(workspace[0], "rollouts", 0)
    assert clip.times == TIMES
    assert clip.curves == {}
    assert [chunk is None for chunk in clip.actions] == [False, False, False, True]
    for camera, rows in clip.views.items():
        assert list(rows) == ["recorded"]
        np.testing.assert_array_equal(rows["recorded"], workspace[1].images[camera])


def test_an_imagined_frame_stands_where_its_chunk_ended(trained):
    workspace, episode = trained
    clip = view.episode_clip(workspace, "rollouts", 0)
    first, second, third, last = clip.views["hand"]["imagined"]
    assert first is None
    assert last is None  # its chunk was cut off
    np.testing.assert_array_equal(second, episode.images["hand"][0] + 10)
    np.testing.assert_array_equal(third, episode.images["hand"][1] + 10)
    recorded = episode.images["top"].mean((1, 2, 3)) / 255
    np.testing.assert_allclose(clip.curves["P(done), recorded frame"], recorded, rtol=1e-5)
    imagined = clip.curves["P(done), imagined frame"]
    assert (imagined[0], imagined[3]) == (None, None)
    np.testing.assert_allclose(imagined[1], recorded[0] + 10 / 255, rtol=1e-5)
    np.testing.assert_allclose(clip.curves["value"], 1 + 2 * episode.proprio[:, 0], rtol=1e-5)


def test_a_branch_goes_on_from_its_frame_beside_the_recording(trained):
    workspace, episode = trained
    clip = view.branch_clip(workspace, "rollouts", 0, step=2, chunks=2)
    assert clip.times == [2, 4, 6]
    rows = clip.views["top"]
    np.testing.assert_array_equal(rows["recorded"][1], episode.images["top"][2])
    assert rows["recorded"][2] is None
    for i, frame in enumerate(rows["imagined"]):
        np.testing.assert_array_equal(frame, episode.images["top"][1] + 10 * i)
    assert [None if a is None else a.shape for a in clip.actions] == [(2, 1), (2, 1), None]
    assert np.diff(clip.curves["P(done), imagined frame"]) == pytest.approx([10 / 255] * 2)
    assert clip.curves["value"] == pytest.approx([1 + 2 * episode.proprio[1, 0]] * 3)


def test_the_page_holds_the_frames_and_asks_nothing_of_the_network(workspace, capsys):
    directory, episode = workspace[0].root, workspace[1]
    assert main([f"--workdir={directory}", "--episode=rollouts:0"]) == 0
    page = (directory / "view/episode_rollouts_0.html").read_text()
    assert page.count("</script>") == 1  # the instruction is escaped
    assert not re.search(r"(src|href)=|https?://", page)
    data = json.loads(re.search(r"const data = (.*);\n", page).group(1))
    assert tuple(data["views"]) == CAMERAS
    shown = [base64.b64decode(x) for x in data["views"]["top"]["recorded"]]
    frames = [np.asarray(Image.open(io.BytesIO(x))) for x in shown]
    np.testing.assert_array_equal(frames, episode.images["top"])
    np.testing.assert_allclose(data["actions"][0], episode.actions[0], atol=1e-4)


def test_a_rerun_recording_holds_views_actions_and_curves(trained, tmp_path):
    pytest.importorskip("rerun", reason="the optional rerun-sdk is not installed (extra: view)")
    clip = view.episode_clip(trained[0], "rollouts", 0)
    view.write_rerun(clip, tmp_path / "clip.rrd")
    content = (tmp_path / "clip.rrd").read_bytes()
    views = [f"/{camera}/{row}" for camera in CAMERAS for row in ("recorded", "imagined")]
    for entity in ("/actions", "/curves/value", *views):
        assert entity.encode() in content


def test_what_does_not_exist_is_named(trained, tmp_path, capsys):
    workspace, _ = trained
    with pytest.raises(StageError, match="episodes 0 to 0; there is no 1"):
        view.episode_clip(workspace, "rollouts", 1)
    with pytest.raises(StageError, match="no frame at step 3; there are frames at 0, 2, 4, 5"):
        view.branch_clip(workspace, "rollouts", 0, step=3, chunks=1)
    assert main([f"--workdir={tmp_path / 'empty'}", "--episode=rollouts:0"]) == 1
    assert "no stage has begun" in capsys.readouterr().err
