"""A policy behind a server acts as the same policy here; a server that is lost is waited for."""

import contextlib
import threading

import numpy as np
import pytest
from websockets.sync.server import serve

from mbpo_jax.envs.requests import EpisodeRequest, Query
from mbpo_jax.envs.sim.simulator import TaskInfo
from mbpo_jax.serving import acting
from mbpo_jax.serving.client import RemotePolicy, ServerGone
from mbpo_jax.serving.protocol import SHUTTING_DOWN, pack, unpack
from mbpo_jax.serving.server import serving_in_thread
from tests.serving.conftest import message

QUERIES = [
    Query(
        EpisodeRequest(0, **start),
        chunk,
        {
            name: np.full((16, 16, 3), 40 * chunk, np.uint8)
            for name in ("agentview", "robot0_eye_in_hand")
        },
        np.arange(8, dtype=np.float32),
    )
    for chunk, start in enumerate(({"seed": 7}, {"init_state_id": 3}))
]


@pytest.fixture(autouse=True)
def suite_without_simulator(monkeypatch):
    monkeypatch.setattr(acting.suites, "task_info", lambda *_: TaskInfo("lift", "lift it", 0))


def test_it_acts_as_the_policy_does_here(served):
    with serving_in_thread(served) as (port, _), remote(port, connections=2) as policy:
        assert policy.metadata == served.metadata
        wants = acting.senses(policy.metadata)
        there = acting.pool_act(policy, wants, "libero_10", [0])(QUERIES)
    here = acting.pool_act(served, wants, "libero_10", [0])(QUERIES)
    assert there.shape == (2, 4, 7)
    np.testing.assert_allclose(there, here, atol=1e-5)
    named = message(
        **{"observation/image": QUERIES[1].images["agentview"]},
        **{"observation/wrist_image": QUERIES[1].images["robot0_eye_in_hand"]},
        **{"observation/state": QUERIES[1].proprio},
        prompt="lift it",
        episode=2**30 + 3,
        chunk_index=1,
    )
    np.testing.assert_allclose(here[1], served.answer([named])[0], atol=1e-5)


def test_a_wrong_key_is_refused_at_once(served):
    with serving_in_thread(served, api_key="open sesame") as (port, _):
        with pytest.raises(ValueError, match="401 wrong or no API key"):
            RemotePolicy(f"ws://127.0.0.1:{port}")
        with remote(port, api_key="open sesame") as policy:
            assert policy.metadata == served.metadata


def remote(port, **options):
    return RemotePolicy(f"ws://127.0.0.1:{port}", **{"patience_s": 30.0, **options})


@contextlib.contextmanager
def server_that(answers):
    """One that says nothing of its policy; `answers` are what its connections do with each
    observation, in turn: give something, or hang up where that is None. Yields its port."""
    answers, seen = iter(answers), []

    def converse(connection):
        connection.send(pack({}))
        for data in connection:
            seen.append(unpack(data))
            answer = next(answers)
            if answer is None:
                return
            connection.send(answer)

    with serve(converse, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1], seen
        finally:
            server.shutdown()
            thread.join()


def actions(*shape):
    return pack({"actions": np.ones(shape, np.float32)})


def test_a_server_that_hangs_up_is_called_again():
    with (
        server_that([actions(10, 7), None, SHUTTING_DOWN, actions(10, 7)]) as (port, seen),
        remote(port) as policy,
    ):
        wants = acting.senses(policy.metadata)
        act = acting.pool_act(policy, wants, "libero_10", [0])
        assert act(QUERIES[:1]).shape == act(QUERIES[1:]).shape == (1, 5, 7)
    assert wants.image_size == 224
    assert [x["observation/image"].max() for x in seen] == [0, 40, 40, 40]
    assert set(seen[0]) == {
        "observation/image",
        "observation/wrist_image",
        "observation/state",
        "prompt",
    }


def test_one_that_stays_away_is_one_message():
    with server_that([actions(10, 7)]) as (port, _):
        policy = remote(port, patience_s=1.0)
        policy.answer([message()])
    with policy, pytest.raises(ServerGone, match=rf"{port}, tried for 1 s \(.*refused"):
        policy.answer([message()])
    with pytest.raises(ServerGone, match="no policy server answers"):
        remote(port, patience_s=0.6)
    with pytest.raises(ValueError, match="is no address"):
        RemotePolicy("http://127.0.0.1:8000")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("Traceback\n  File\nKeyError: 'observation/head'\n", "refuses .*: KeyError: 'observation"),
        (pack({"chunk": 1}), r"without 'actions'; there are \['chunk'\]"),
        (actions(10, 14), r"actions \[10, 14\]; libero_10 needs 5 steps or more of 7 numbers"),
        (actions(4, 7), r"actions \[4, 7\]"),
        (actions(7), r"actions \[7\]"),
        (pack({"actions": np.full((10, 7), np.nan)}), "not finite"),
    ],
)
def test_a_wrong_answer_is_one_message(answer, complaint):
    with server_that([answer]) as (port, _), remote(port) as policy:
        act = acting.pool_act(policy, acting.senses(policy.metadata), "libero_10", [0])
        with pytest.raises(ValueError, match=complaint):
            act(QUERIES[:1])


def test_what_a_policy_wants_and_what_the_user_says():
    ours = {
        "image_keys": {"top": ["observation/top", "observation/image"]},
        "image_size": 64,
        "action_horizon": 10,
    }
    assert acting.senses(ours) == acting.Senses({"top": "observation/top"}, 64, 10, True)
    assert acting.senses(ours, 4, 128)[1:3] == (128, 4)
    assert acting.senses({"action_horizon": 50})[1:3] == (224, 50)
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"{steps} steps of each chunk"):
            acting.senses(ours, steps)
    with pytest.raises(ValueError, match="0 pixels"):
        acting.senses(ours, image_size=0)


def test_another_robots_policy_is_refused():
    acting.check_robot({}, "libero_10")
    acting.check_robot({"action_dim": 14, "state_dim": 16}, "two_arm_lift")
    with pytest.raises(ValueError, match="its action_dim is 14, that of libero_10 7"):
        acting.check_robot({"action_dim": 14}, "libero_10")
    with pytest.raises(ValueError, match="its state_dim is 14, that of two_arm_lift 16"):
        acting.check_robot({"action_dim": 14, "state_dim": 14}, "two_arm_lift")
