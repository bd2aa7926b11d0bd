import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs.libero_long import get_config
from experiments.benchmarks import plan, steps
from experiments.benchmarks.hlo import Cost, axes_of_groups, program_cost
from mbpo_jax.stages.build import build_policy
from mbpo_jax.training.sharding import make_mesh
from tests.policy.conftest import stats

MESH = {"data": 4, "fsdp": 2}
# Per round of the loop, of 3: an all-gather over fsdp (groups of 2) with a result of 4096 bytes
# sends 4096 / 2; a product of [16, 32] by [32, 8] takes 2 * 16 * 32 * 8 operations on
# 4 * (512 + 256 + 128) bytes. After it, an all-reduce of 64 float32 over data (groups of 4) sends
# 2 * 256 * 3 / 4, and one of 10 float32 over all devices 2 * 40 * 7 / 8.
PROGRAM = """HloModule example

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[16,32])) -> (s32[], f32[16,32]) {
  %x = f32[16,32]{1,0} get-tuple-element(%carry), index=1
  %w = f32[32,8]{1,0} constant({...})
  %gather = f32[32,32]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %dot = f32[16,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (p: f32[16,32]) -> f32[64] {
  %loop = (s32[], f32[16,32]{1,0}) while(%start), condition=%test, body=%body, TRIPS
  %g = f32[64]{0} parameter(1)
  %mean = f32[64]{0} all-reduce(%g), replica_groups=REPLICAS, to_apply=%add
  %all = (f32[2]{0}, f32[8]{0}) all-reduce(%a, %b), channel_id=3, replica_groups={}
}
"""
TRIPS = 'backend_config={"known_trip_count":{"n":"3"}}'
OVER_DATA = [
    "[2,4]<=[4,2]T(1,0)",
    "{{0,2,4,6},{1,3,5,7}}",
    "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}",
    "mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}",
    "mesh['axis_0'=8] {'axis_0':(1)4}",  # the first four parts of the axis
]


def program(groups: str) -> str:
    return PROGRAM.replace("REPLICAS", groups).replace("TRIPS", TRIPS)


@pytest.mark.parametrize("groups", OVER_DATA)
def test_bytes_of_a_small_program_by_hand(groups):
    cost = program_cost(program(groups), MESH)
    assert cost == Cost(
        collectives={
            ("all-gather", "fsdp"): 3 * 2048.0,
            ("all-reduce", "data"): 384.0,
            ("all-reduce", "data+fsdp"): 70.0,
        },
        flops=3 * 8192.0,
        bytes=3 * 3584.0,
    )


def test_axes_along_which_devices_differ():
    assert axes_of_groups(np.array([0, 1]), MESH) == "fsdp"
    assert axes_of_groups(np.array([1, 3, 5, 7]), MESH) == "data"
    assert axes_of_groups(np.array([0, 3]), MESH) == "data+fsdp"
    assert axes_of_groups(np.array([5]), MESH) == ""


def test_unknown_notation_is_refused():
    with pytest.raises(ValueError, match="not known"):
        program_cost(program("<new>"), MESH)


@pytest.fixture(scope="module")
def measured() -> plan.Measured:
    config = get_config("micro")
    return plan.plan(config, jax.devices()[:1], "SFT")[1][0]


def test_a_real_step_is_measured(measured):
    # Of 1.7 M parameters the state has value, average and two moments; one moment of the 1.4 M in
    # matrices of layers, which Muon moves.
    assert 4 * (4 * 1.6e6 - 1.5e6) < measured.arguments < 4 * (4 * 1.7e6 - 1.3e6) + 2e6
    assert measured.aliased > 0.95 * 4 * (4 * 1.6e6 - 1.5e6)
    # A training step takes about 6 operations per parameter and token; a frame has 2 * 16 image
    # tokens and 16 of the prompt.
    tokens = 32 * 48
    assert 1.0 < measured.cost.flops / (2 * 1.7e6 * tokens) < 6.0
    assert measured.cost.unknown_loops == 0
    assert not measured.cost.collectives


def improvement(method: str) -> list[steps.Step]:
    config = get_config("tiny")
    config.rl.method = method
    planned = steps.Steps(config, make_mesh(devices=jax.devices()[:1]))
    return [step for step in planned if step.stage == "improve"]


def test_the_update_has_the_anchor_of_its_config():
    assert get_config("tiny").rl.anchor_weight
    *_, update = improvement("ppo")
    update.program.lower(*update.arguments)


def test_what_ranks_plans_the_ranking_and_the_fit_to_its_choice():
    ranking, fit = improvement("ranked")
    assert ranking.runs == 4  # of 4 states, with groups of 2 branches, 2 branches at a time
    assert fit.runs == 2  # steps
    found = ranking.program.lower(*ranking.arguments).out_info
    assert found["score"].shape == (1, 2)  # groups, branches
    fit.program.lower(*fit.arguments)
    assert not {ranking.name, fit.name} & {step.name for step in improvement("ppo")}


def test_what_does_not_fit_is_said(measured):
    assert "DOES NOT FIT" in plan.memory_table([measured], budget=measured.total - 1)
    assert "DOES NOT" not in plan.memory_table([measured], budget=measured.total)


def test_the_roofline_by_hand(measured):
    cost = Cost({("all-gather", "fsdp"): 6.0, ("all-reduce", "data"): 8.0}, flops=10.0, bytes=30.0)
    step = plan.Measured(measured.step, 0, 0, 0, 0, cost)
    peaks = plan.Peaks("", flops=5.0, memory=10.0, link=2.0, network=1.0)
    assert step.seconds(peaks, 8) == {"compute": 2, "memory": 3, "link": 7, "network": 0}
    assert step.seconds(peaks, 16) == {"compute": 2, "memory": 3, "link": 3, "network": 8}


def test_weak_scaling_keeps_a_devices_work_and_adds_the_gradients_exchange():
    depths = {f"policy.{part}.depth": 2 for part in ("language", "expert")}
    command = [sys.executable, "-m", "experiments.plan", "--config=configs/libero_long.py:tiny"]
    command += ["--weak_scaling=1,2", "--devices=2", "--only=SFT"]
    command += [f"--config.{name}={value}" for name, value in depths.items()]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = next(line for line in printed.splitlines() if line.startswith("SFT step"))
    alone, sent_alone, one_of_two, sent = map(float, re.findall(r"[\d.]+", row))
    assert one_of_two == pytest.approx(alone, rel=0.02)
    assert sent_alone == 0.0

    config = get_config("tiny").copy_and_resolve_references()
    config.update_from_flattened_dict(depths)
    policy = build_policy(config, {name: stats(n) for name, n in (("actions", 7), ("state", 8))})
    actor = jax.eval_shape(policy.init, jax.random.key(0))["actor"]
    # The all-reduce of float32 gradients between two: 2 (g - 1) / g = 1 times their bytes.
    gradients = 4 * sum(x.size for x in jax.tree.leaves(actor)) / 1e6
    assert sent == pytest.approx(gradients, rel=0.02)
