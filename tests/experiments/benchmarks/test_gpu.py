"""The target `gpu` of the benchmark, at its tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import libero_long
from experiments import benchmark
from experiments.benchmarks import gpu, gpu_rows, policy, world_model
from experiments.benchmarks.gpu_timing import Group, Row, Work
from mbpo_jax.mbpo import Settings
from mbpo_jax.policy.config import FlowConfig
from mbpo_jax.stages.build import dataclass_from
from mbpo_jax.world_model.config import UMMConfig

ROOT = Path(__file__).parents[3]
# Runs the command where nothing can be imported but the standard library, this repository and five
# packages with what they require.
ALONE = """
import importlib.metadata, re, runpy, sys

wanted, allowed = ["jax", "flax", "optax", "orbax-checkpoint", "chex"], set()
while wanted:
    name = re.sub("[-_.]+", "-", wanted.pop()).lower()
    try:
        required = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    if name not in allowed:
        allowed.add(name)
        wanted += [re.match("[A-Za-z0-9._-]+", r)[0] for r in required if "extra ==" not in r]
others = {
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if not any(re.sub("[-_.]+", "-", owner).lower() in allowed for owner in owners)
}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others - {"mbpo_jax", "experiments", "configs"}:
            raise ModuleNotFoundError(f"{name} is not there", name=name)

sys.meta_path.insert(0, Blocker())
for absent in ("jaxtyping", "ml_collections", "grain", "tqdm", "tensorflow_datasets", "PIL"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{absent} could be imported")
sys.argv[0] = "benchmark"
runpy.run_module("experiments.benchmark", run_name="__main__")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Output folder and text of the command with five packages."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-c", ALONE, "--target=gpu", "--size=tiny", "--minutes=60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    found = subprocess.run(
        [*command, f"--out={out}"], env=environment, cwd=ROOT, text=True, capture_output=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return out, found.stdout


@pytest.mark.long
def test_every_row_is_measured_with_five_packages(run):
    out, text = run
    (only,) = json.loads((out / "gpu.json").read_text())["runs"]
    rows = {row["row"]: row for row in only["rows"]}
    assert list(rows) == gpu_rows.row_names(gpu_rows.sizes("tiny"))
    for name, row in rows.items():
        assert name in text
        assert row["runs"] >= 5
        assert row["milliseconds"] >= row["fastest_milliseconds"] > 0
        assert row["compile_seconds"] > 0
        assert row["flops"] > 0
        assert row["program_bytes"] > 0
        assert row["peak_bytes"] is None  # of a CPU
    assert rows["pi05_sample_8"]["flops"] > 6 * rows["pi05_sample_1"]["flops"]
    assert rows["small_imagine_4"]["chunks_per_second"] == pytest.approx(
        8e3 / rows["small_imagine_4"]["milliseconds"]
    )


def test_a_second_run_keeps_the_first_and_names_what_is_there(tmp_path, capsys):
    for _ in range(2):
        assert (
            benchmark.main(
                ["--target=gpu", "--size=tiny", f"--out={tmp_path}", "--rows=matrix_peak"]
            )
            == 0
        )
    runs = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert [[row["row"] for row in each["rows"]] for each in runs] == [["matrix_peak"]] * 2
    assert capsys.readouterr().out.count("has a run of") == 1


def test_a_row_without_time_is_skipped_and_named(tmp_path, capsys):
    arguments = ["--target=gpu", "--size=tiny", f"--out={tmp_path}", "--rows=matrix_peak"]
    assert benchmark.main([*arguments, "--minutes=0.001"]) == 0
    assert "skipped; again with --rows=matrix_peak" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["runs"][0]["rows"]
    assert "--minutes=0.001" in row["skipped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=full"], "no accelerator"),
        (["--size=tiny", "--rows=nothing"], "there is no row 'nothing'; rows: matrix_peak, "),
        (["--size=tiny", "--profile=nothing"], "there is no row 'nothing'"),
    ],
)
def test_wrong_arguments_are_one_message(tmp_path, capsys, arguments, message):
    if jax.default_backend() != "cpu" and "--size=full" in arguments:
        pytest.skip("there is an accelerator")
    with pytest.raises(SystemExit):
        benchmark.main(["--target=gpu", f"--out={tmp_path}", *arguments])
    assert message in capsys.readouterr().err


def test_a_damaged_record_is_kept_and_named(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text("[")
    with pytest.raises(SystemExit):
        benchmark.main(["--target=gpu", "--size=tiny", f"--out={tmp_path}"])
    assert "damaged" in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_text() == "["


def test_one_failure_leaves_the_other_rows(tmp_path, monkeypatch, capsys):
    def broken(params, batch):
        raise RuntimeError("broken\nand more")

    def good(params, batch):
        return Work(lambda x: x @ x.T, lambda: (jax.numpy.ones((batch, 64)),))

    group = Group(dict, {"bad": Row(broken), "good": Row(good)})
    monkeypatch.setattr(gpu, "groups", lambda sizes: (group,))
    assert gpu.run("tiny", tmp_path) == 1
    bad, good = json.loads((tmp_path / "gpu.json").read_text())["runs"][0]["rows"]
    assert bad == {"row": "bad", "failed": "RuntimeError: broken"}
    assert good["milliseconds"] > 0
    assert "failed: RuntimeError: broken" in capsys.readouterr().out


def test_small_is_the_size_of_the_config():
    config, sizes = libero_long.get_config("small"), gpu_rows.Sizes
    settings = dataclass_from(Settings, config.rl)
    for name in (
        "branch_chunks",
        "group_size",
        "reward_threshold",
        "anchor_weight",
        "gradient_accumulation",
    ):
        assert getattr(gpu_rows.SMALL_SETTINGS, name) == getattr(settings, name)
    assert sizes.sft_batch == config.sft.batch_size
    assert sizes.dynamics_batch == config.world_model.dynamics_batch_size
    assert sizes.reward_batch == config.world_model.reward_batch_size
    assert sizes.matrix_learning_rate == config.world_model.training.matrix_learning_rate
    assert sizes.world_prompt == config.world_model.max_prompt_tokens
    assert sizes.minibatch == config.rl.minibatch_size
    assert sizes.anchors == config.rl.anchor_batch
    full = gpu_rows.sizes("full")
    assert full.policy.flow == dataclass_from(FlowConfig, config.rl.flow)
    assert full.world == dataclass_from(UMMConfig, config.world_model.model)


def test_sizes_of_the_other_targets_are_known():
    assert benchmark.VARIANTS == libero_long.VARIANTS
    for target, module in (("policy", policy), ("world_model", world_model)):
        assert benchmark.SIZES[target][0] == tuple(module.sizes())
