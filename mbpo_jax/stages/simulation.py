"""The simulator workers of a config, and what acts for them."""

from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from mbpo_jax.data.pipelines import collate
from mbpo_jax.envs.requests import EpisodeRequest, EpisodeResult, Query
from mbpo_jax.envs.suites import task_info
from mbpo_jax.envs.workers.pool import EnvPool, PoolAct
from mbpo_jax.stages.acting import Act, acting_program
from mbpo_jax.stages.build import Config, observation_builder
from mbpo_jax.types import Params


def make_pool(config: Config) -> EnvPool:
    """The simulator workers of a config; a suite or task that does not exist is a ValueError."""
    for task in config.tasks:
        task_info(config.suite, task)
    return EnvPool(
        config.suite,
        num_workers=config.workers,
        cameras=tuple(config.cameras),
        image_size=config.image_size,
        chunk=config.chunk,
        backend=config.worker_backend,
    )


def batched_act(config: Config, act: Act, params: Params) -> PoolAct:
    """An acting function, such as `FlowPolicy.act`, for the pool. A query's noise depends on its
    episode and chunk alone, so that an episode comes out the same however queries are batched."""
    builder = observation_builder(config)
    instructions = {t: task_info(config.suite, t).instruction for t in config.tasks}
    program = acting_program(act, config.seed)

    def act_on(queries: list[Query]) -> np.ndarray:
        padded = queries + [queries[0]] * (config.workers - len(queries))
        observations = collate(
            [builder(q.images, q.proprio, instructions[q.request.task_id]) for q in padded]
        )
        identities = np.array([(episode_number(q.request), q.chunk_index) for q in padded])
        return np.asarray(program(params, observations, identities))[: len(queries)]

    return act_on


def progress(results: Iterable[EpisodeResult], name: str, total: int) -> Iterable[EpisodeResult]:
    """The results as they come, under a progress bar with the running success rate."""
    successes = 0
    with tqdm(total=total, desc=name, unit="ep") as bar:
        for result in results:
            successes += result.episode.success
            bar.update()
            bar.set_postfix(success=f"{successes}/{bar.n}")
            yield result


def episode_number(request: EpisodeRequest) -> int:
    """A number that differs between the episodes of a task, random resets and fixed states."""
    return request.seed if request.seed >= 0 else 2**30 + request.init_state_id
