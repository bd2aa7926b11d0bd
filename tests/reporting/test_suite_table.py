from mbpo_jax.reporting.suite_table import suite_table


def part(successes, **changes):
    rate = successes / 10
    interval = [max(0, rate - 0.2), min(1, rate + 0.2)]
    return {
        "successes": successes,
        "episodes": 10,
        "success_rate": rate,
        "interval": interval,
        "mean_length": 123.4,
        "reached": 9,
        **changes,
    }


def test_every_task_suite_and_drop_has_a_line():
    tasks = {"0": part(8, instruction="lift it"), "3": part(6, instruction="drop it")}
    results = {
        "until_end": False,
        "suites": {
            "libero_10": {"summary": part(7, tasks=tasks)},
            "libero_10_swap": {
                "summary": part(1, tasks={"0": part(1, instruction="lift it")}),
                "drop": {"against": "libero_10", "drop": 0.7, "interval": [0.31, 0.88]},
            },
        },
    }
    lines = [" ".join(line.split()) for line in suite_table(results).splitlines()]
    assert lines[0] == "suite task success 95 % steps instruction"
    assert lines[2:] == [
        "libero_10 0 8/10 = 80 % 60–100 123 lift it",
        "libero_10 3 6/10 = 60 % 40–80 123 drop it",
        "libero_10 all 7/10 = 70 % 50–90 123",
        "libero_10_swap 0 1/10 = 10 % 0–30 123 lift it",
        "libero_10_swap against libero_10: success is 70 points lower (95 %: 31 to 88)",
    ]
    results["until_end"] = True
    line = suite_table(results).splitlines()[2]
    assert " ".join(line.split()) == "libero_10 0 8/10 = 80 % 60–100 9/10 123 lift it"
