"""Generalised advantage estimation over action chunks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mbpo_jax.rl.ppo import PPOBatch
from mbpo_jax.types import Branch


def chunk_discount(discount: float, chunk: int, convention: str) -> tuple[float, float]:
    """Discount per chunk and the weight of a reward earned at the chunk's last step.

    The paper (arXiv 2603.20607, eq. 4) discounts every environment step: a chunk of k steps
    discounts the future by γ^k, and a reward at its last step counts γ^(k-1). The reference
    implementation discounts once per chunk: γ and 1.

    Args:
        discount: γ in [0, 1).
        chunk: k, environment steps per chunk.
        convention: "paper" or "reference".

    Returns:
        (discount of the next chunk's value, weight of this chunk's terminal reward).
    """
    if convention == "paper":
        return discount**chunk, discount ** (chunk - 1)
    if convention == "reference":
        return discount, 1.0
    raise ValueError(f"rl.discount_per is {convention!r}; choose 'paper' or 'reference'")


def generalized_advantages(
    reward: Float[Array, "n *m"],
    value: Float[Array, "n *m"],
    done: Float[Array, "n *m"],
    bootstrap_value: Float[Array, "*m"],
    discount: float,
    gae_lambda: float,
) -> tuple[Float[Array, "n *m"], Float[Array, "n *m"]]:
    """Advantages and value targets (arXiv 1506.02438, eq. 16, on the chunk MDP).

    δ_i = r_i + γ (1 - done_i) V_{i+1} - V_i,  A_i = δ_i + γ λ (1 - done_i) A_{i+1}, where
    V_n is `bootstrap_value` and γ, λ act per chunk. `done_i` cuts the bootstrap after chunk i.

    Returns:
        (advantages, returns), both [n, *m]; returns are advantages + value.
    """
    next_value = jnp.concatenate([value[1:], bootstrap_value[None]])
    continues = 1.0 - done
    delta = reward + discount * continues * next_value - value

    def backward(advantage, step):
        delta_i, continues_i = step
        advantage = delta_i + discount * gae_lambda * continues_i * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(
        backward, jnp.zeros_like(bootstrap_value), (delta, continues), reverse=True
    )
    return advantages, advantages + value


def normalize_advantages(
    advantage: Float[Array, "*n"], valid: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """Zero mean and unit (unbiased) standard deviation over the entries where valid is 1."""
    count = jnp.maximum(valid.sum(), 1.0)
    mean = (advantage * valid).sum() / count
    variance = (jnp.square(advantage - mean) * valid).sum() / jnp.maximum(count - 1.0, 1.0)
    return (advantage - mean) / (jnp.sqrt(variance) + 1e-5)


def leave_one_out(returns: Float[Array, "m"], group_size: int) -> Float[Array, "m"]:
    """Each return minus the mean of the others of its group, `group_size` neighbours (RLOO,
    arXiv 2402.14740, eq. 8): what a choice gained over other choices from the same start."""
    grouped = returns.reshape(-1, group_size)
    others = (grouped.sum(1, keepdims=True) - grouped) / (group_size - 1)
    return (grouped - others).reshape(-1)


def exchanged(branch: Branch, group_size: int) -> Branch:
    """The control of an experiment: every group has the advantages of its neighbour, so that
    updates are as large as before and know nothing of what the chunks led to.

    Within a group they would: `leave_one_out` of the others falls with one's own return.
    """
    return branch.replace(advantage=jnp.roll(branch.advantage, group_size, axis=1))


def with_advantages(
    branch: Branch, discount: float, gae_lambda: float, group_size: int = 1
) -> Branch:
    """The branch with its `generalized_advantages`; `discount` and `gae_lambda` act per chunk.

    Args:
        group_size: branches from one start state, neighbours; with more than one the first chunks'
            advantages are `leave_one_out` instead of being compared with the value there.
    """
    advantage, target = generalized_advantages(
        branch.reward, branch.value, branch.done, branch.bootstrap_value, discount, gae_lambda
    )
    if group_size > 1:
        advantage = advantage.at[0].set(leave_one_out(target[0], group_size))
    return branch.replace(advantage=advantage, target=target)


def learning_batch(branch: Branch, normalize: bool) -> PPOBatch:
    """Flattens a branch [n, M] with advantages into chunks [M * n].

    The chunks of a branch are neighbours, so that a batch that is split over devices stays where
    its branches are.

    Args:
        normalize: whether advantages are normalised over the valid chunks.
    """
    advantage = branch.advantage
    if normalize:
        advantage = normalize_advantages(advantage, branch.valid)
    batch = PPOBatch(
        observation=branch.observation,
        chain=branch.chain,
        log_prob=branch.log_prob,
        value=branch.value,
        advantage=advantage,
        target=branch.target,
        valid=branch.valid,
    )
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), batch)
