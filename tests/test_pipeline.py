"""The whole method at the smallest size, on the real simulator."""

import dataclasses
import json
import shutil

import pytest

from configs import libero_long
from mbpo_jax import pipeline
from mbpo_jax.envs.workers.pool import WorkerError
from mbpo_jax.stages.workspace import StageError, Workspace


def tiny_config():
    return libero_long.get_config("tiny")


@pytest.mark.libero
def test_end_to_end(tmp_path, capsys):
    pytest.importorskip("libero", reason="the simulator is not installed (extra: libero)")
    pipeline.run(tiny_config(), tmp_path)
    output = capsys.readouterr().out
    assert "report:" in output
    assert "exact McNemar" in output

    results = json.loads((tmp_path / "results.json").read_text())
    always = [name for name, stage in pipeline.STAGES.items() if not stage.on_request]
    assert list(results["stages"]) == always
    demonstrations = results["stages"]["demonstrations"]
    assert demonstrations["episodes"] == 2
    evaluation = results["stages"]["evaluate"]
    assert evaluation["policies"]["improved"]["episodes"] == 2
    assert evaluation["paired"]["improved"]["pairs"] == 2
    assert evaluation["policies"]["improved_best"]["episodes"] == 2
    assert set(results["stages"]["world_model"]["fidelity"]) == set(tiny_config().cameras)

    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 6
    assert "data:image/gif;base64," in page
    assert 'src="http' not in page
    assert 'href="http' not in page

    # A second run finds everything finished and changes nothing.
    before = (tmp_path / "evaluate/done.json").stat().st_mtime_ns
    pipeline.run(tiny_config(), tmp_path)
    assert capsys.readouterr().out.count("finished before") == len(always)
    assert (tmp_path / "evaluate/done.json").stat().st_mtime_ns == before

    # The paper's optimiser on the same episodes, its best state, and what bounds both.
    for stage in ("improve", "evaluate"):
        shutil.rmtree(tmp_path / stage)
    config = tiny_config()
    config.rl.method, config.evaluation.checkpoint, config.evaluation.best_of = "ppo", "best", 1
    config.evaluation.update({"episodes_per_task": 0, "resets_per_task": 1})
    pipeline.run(config, tmp_path, ["siblings", "improve", "evaluate", "report"])
    results = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert "policies" not in results["evaluate"]
    assert results["evaluate"]["paired_resets"]["improved"]["pairs"] == 1
    assert "data:image/gif;base64," in (tmp_path / "report.html").read_text()
    assert results["improve"]["imagined_chunks"] == 2 * 4 * 2  # refills, start states, chunks
    siblings = results["siblings"]
    assert (siblings["start_states"], len(siblings["imagined"])) == (2, config.world_model.horizon)
    assert "known to imagination after" in (tmp_path / "report.html").read_text()

    # Another branch length belongs in another directory; the message says what differs.
    other = tiny_config()
    other.rl.branch_chunks = 1
    with pytest.raises(StageError, match=r"rl\.branch_chunks: 2 there, 1 now"):
        pipeline.run(other, tmp_path)


def test_an_unknown_stage_names_the_nearest(tmp_path):
    with pytest.raises(StageError, match="did you mean evaluate"):
        pipeline.run(tiny_config(), tmp_path, ["evalute"])


def test_a_stage_without_its_inputs_says_what_to_run(tmp_path):
    with pytest.raises(StageError, match="'demonstrations' has not finished"):
        pipeline.run(tiny_config(), tmp_path, ["sft"])


@pytest.mark.parametrize("content", ["", "<!DOCTYPE html>", "[1]", '{"a": '])
@pytest.mark.parametrize("name", ["config.json", "done.json"])
def test_a_damaged_record_of_a_stage_is_named(tmp_path, name, content):
    workspace = Workspace(tmp_path, tiny_config())
    sections = pipeline.STAGES["demonstrations"].sections
    path = workspace.begin("demonstrations", sections) / name
    workspace.finish("demonstrations", {})
    path.write_text(content)
    with pytest.raises(StageError, match="damaged") as error:
        pipeline.run(tiny_config(), tmp_path, ["demonstrations"])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "error", [WorkerError("no OpenGL"), ModuleNotFoundError("no simulator"), ValueError("no task")]
)
def test_what_a_user_can_mend_is_one_message(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    stage = dataclasses.replace(pipeline.STAGES["demonstrations"], run=fail)
    monkeypatch.setitem(pipeline.STAGES, "demonstrations", stage)
    with pytest.raises(SystemExit, match="1"):
        pipeline.main(tiny_config(), str(tmp_path), ["demonstrations"])
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("mbpo_jax.stages.workspace.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StageError, match="GiB are free"):
        Workspace(tmp_path, tiny_config()).begin("demonstrations", ["seed"])


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'micro'"):
        libero_long.get_config("mikro")


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(AttributeError, match="branch_chunks"):
        libero_long.get_config("micro").rl.branch_chunk = 1
