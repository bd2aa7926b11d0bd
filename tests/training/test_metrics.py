import os
import sys
import types

import pytest

from mbpo_jax.training.metrics import MetricWriter, check_loggers, read_metrics


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    """The runs that were begun in stand-ins of wandb and trackio."""
    begun = []

    def init(**options):
        begun.append(FakeRun(**options))
        return begun[-1]

    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()
        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
    return begun


def test_every_logger_gets_every_finite_number(tmp_path, runs):
    with MetricWriter(tmp_path / "sft", loggers=("wandb", "trackio")) as writer:
        writer.write(1, {"loss": 2, "grad": float("inf")})
        writer.write(2, {"loss": 1.5})
    assert [r["loss"] for r in read_metrics(tmp_path / "sft/metrics.jsonl")] == [2, 1.5]
    assert len(runs) == 2
    for run in runs:
        assert run.logged == [(1, {"loss": 2.0}), (2, {"loss": 1.5})]
        assert run.finished
        assert run.options["name"].startswith(f"{tmp_path.parent.name}/{tmp_path.name}/sft")
    assert not (tmp_path / "sft/tensorboard").exists()


def test_a_resumed_run_is_the_same_run_and_another_folder_another(tmp_path, runs):
    for directory in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        MetricWriter(directory, first_step=3, loggers=("wandb",)).close()
    first, resumed, other = (run.options["id"] for run in runs)
    assert first == resumed != other
    assert all(run.options["resume"] == "allow" for run in runs)


def test_a_logger_that_cannot_be_used_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no logger 'tensorbord'; choose from tensorboard, wandb"):
        check_loggers(["tensorbord"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs the package wandb, which is not installed"):
        check_loggers(["tensorboard", "wandb"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_package_takes_the_records(tmp_path, monkeypatch, name):
    pytest.importorskip(name, reason=f"the optional logger {name} is not installed")
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    monkeypatch.setitem(os.environ, "TRACKIO_DIR", str(tmp_path / "trackio"))
    for first_step in (0, 2):
        with MetricWriter(tmp_path / "run", first_step, loggers=(name,)) as writer:
            writer.write(first_step + 1, {"loss": 0.5})
    assert any(p.suffix in (".wandb", ".db") and p.stat().st_size for p in tmp_path.rglob("*"))
