"""Workers on a Ray cluster of two nodes, both on this machine."""

import numpy as np
import pytest

from mbpo_jax.envs.requests import EpisodeRequest
from mbpo_jax.envs.workers.pool import EnvPool

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    arguments = {"num_cpus": 2, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def requests(*seeds):
    return [EpisodeRequest(0, seed=seed) for seed in seeds]


def seeds(results):
    return sorted(result.request.seed for result in results)


def test_more_workers_than_the_cluster_has_are_refused(cluster):
    with pytest.raises(ValueError, match="5 workers need a CPU each, the Ray cluster has 4"):
        EnvPool("libero_10", 5, backend="ray")


def test_a_policy_answers_workers_on_both_nodes(cluster, fake_workers, tmp_path):
    def act(queries):
        return np.stack([np.full((10, 7), q.proprio[0] + q.chunk_index) for q in queries])

    with EnvPool("libero_10", 2, backend="ray") as pool:
        results = list(pool.policy_episodes(requests(1, 2, 3, 4), act))
    totals = {result.request.seed: result.episode for result in results}
    assert totals == {s: 70 * (3 * s + 3) for s in (1, 2, 3, 4)}
    assert len(list(tmp_path.glob("host?*"))) == 2


def test_a_crash_and_a_hang_are_repaired_and_their_episodes_repeated(cluster, fake_workers):
    with EnvPool("libero_10", 2, timeout_s=15.0, backend="ray") as pool:
        assert seeds(pool.expert_episodes(requests(1, 100, 2, 200))) == [1, 2, 100, 200]
        assert pool.restarts >= 2


def test_an_episode_that_always_crashes_is_an_error_with_its_last_words(cluster, fake_workers):
    with (
        EnvPool("libero_10", 1, backend="ray") as pool,
        pytest.raises(RuntimeError, match=r"(?s)seed=300.*3 times.*status 17.*segmentation fault"),
    ):
        list(pool.expert_episodes(requests(300)))


def test_a_worker_whose_node_goes_is_replaced(cluster, fake_workers):
    with EnvPool("libero_10", 2, backend="ray") as pool:
        assert seeds(pool.expert_episodes(requests(1, 2))) == [1, 2]
        cluster.remove_node(cluster.list_all_nodes()[-1])
        assert seeds(pool.expert_episodes(requests(5, 6, 7))) == [5, 6, 7]
        assert pool.restarts == 1
