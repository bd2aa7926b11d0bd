"""Timing programs that may not fit, on a CPU that says what it has."""

import gzip
import json

import jax
import pytest

from experiments.benchmarks import gpu_timing
from experiments.benchmarks.gpu_timing import Bench, Group, Row, Skipped, Work


def work_of(batch):
    return Work(lambda x: x @ x.T, lambda: (jax.numpy.ones((batch, 64)),))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, minutes=60, compile_seconds=1.0)


def test_the_batch_is_halved_while_memory_runs_out(bench, monkeypatch):
    tried, seconds = [], Bench._seconds

    def exhausted(self, name, work, compiled):
        tried.append(len(work.arguments()[0]))
        if tried[-1] > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return seconds(self, name, work, compiled)

    monkeypatch.setattr(Bench, "_seconds", exhausted)
    row = Row(lambda params, batch: work_of(batch), (16, 8, 4, 2))
    assert bench.row("train", row, {})["batch"] == 4
    assert tried == [16, 8, 4]
    with pytest.raises(Skipped, match="out of memory at batch 8"):
        bench.row("train", Row(row.work, (8,)), {})


def test_what_is_known_not_to_fit_is_not_run(bench, monkeypatch):
    monkeypatch.setattr(gpu_timing, "device_memory", {"bytes_limit": 1000}.get)
    row = Row(lambda params, batch: work_of(batch), (8, 4, 2))  # 256 bytes a row and more
    assert bench.row("train", row, {})["batch"] == 2
    with pytest.raises(Skipped, match="GiB are needed at batch 4"):
        bench.row("train", Row(row.work, (8, 4)), {})
    with pytest.raises(Skipped, match="its parameters take"):
        bench.params(Group(lambda: jax.numpy.ones(1000), {}))


def test_top_operations_are_those_of_the_device(tmp_path):
    names = {(1, 1): ("/device:GPU:0", "Stream #1"), (2, 1): ("/host:CPU", "python")}
    events = [
        event
        for (pid, tid), (process, thread) in names.items()
        for event in (
            {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}},
            {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": thread}},
        )
    ]
    for pid, name, microseconds in ((1, "gemm", 3000), (1, "softmax", 1000), (2, "main", 9000)):
        events.append({"ph": "X", "pid": pid, "tid": 1, "name": name, "dur": microseconds})
    content = gzip.compress(json.dumps({"traceEvents": events}).encode())
    (tmp_path / "machine.trace.json.gz").write_bytes(content)
    lines = gpu_timing.top_operations(tmp_path).splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["3.00", "ms", "75.0%", "gemm"],
        ["1.00", "ms", "25.0%", "softmax"],
    ]
