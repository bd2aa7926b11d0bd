"""The numerical studies behind the report. Each returns plain numbers, ready for JSON.

All run in float64; the caller enables it (`with jax.enable_x64(True)`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.theory import bounds, branch_length, claims, families, learned, search, tabular
from experiments.theory.tabular import ChunkProblem

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def case_study(gamma: float, k: int, n: int, r_max: float) -> dict:
    """The published coefficients, to one decimal."""
    full, branch = bounds.full_horizon(gamma, k, r_max), bounds.branched(gamma, k, n, r_max)

    def rounded(factors):
        return {"eps_pi": round(float(factors.eps_pi), 1), "eps_m": round(float(factors.eps_m), 1)}

    return {"full": rounded(full), "branched": {"n": n, **rounded(branch)}}


def _columns(factors, count: int) -> dict:
    return {
        "eps_pi": np.broadcast_to(factors.eps_pi, count).tolist(),
        "eps_m": np.broadcast_to(factors.eps_m, count).tolist(),
    }


def coefficients(gamma: float, k: int, n: int, r_max: float, *, n_max: int, ks, gammas) -> dict:
    """Coefficients of every bound against n, k and γ, the other two held at the case study."""
    ns, ks = np.arange(n_max + 1), np.asarray(ks)
    gammas = np.asarray(gammas, np.float64)

    def sweep(axis, gamma, k, n):
        count = len(axis)
        table = {
            "axis": axis.tolist(),
            "published full": _columns(bounds.full_horizon(gamma, k, r_max), count),
            "published branch": _columns(bounds.branched(gamma, k, n, r_max), count),
        }
        for rewards in bounds.REWARDS:
            table[f"corrected full, {rewards}"] = _columns(
                bounds.corrected_full_horizon(gamma, k, r_max, rewards=rewards), count
            )
            table[f"corrected branch, {rewards}"] = _columns(
                bounds.corrected_branched(gamma, k, n, r_max, rewards=rewards), count
            )
        return table

    return {
        "n": sweep(ns, gamma, k, ns),
        "k": sweep(ks, gamma, ks, n),
        "gamma": sweep(gammas, gammas, k, n),
    }


def random_claims(key, *, gamma: float, ns, progress, **sizes) -> dict:
    """Ratios gap / bound of every claim on random problems: largest and quantiles by family."""
    check = search.check_random(key, gamma=gamma, ns=tuple(ns), progress=progress, **sizes)
    edges = np.linspace(-6.0, 1.0, 57)
    out = {"problems": len(check.family), "gamma": gamma, "ns": list(ns), "claims": {}}
    out["log10_edges"] = edges.tolist()
    for c, claim in enumerate(claims.CLAIMS):
        ratios = check.ratios[:, :, c]
        logs = np.log10(np.clip(ratios, 1e-6, 10.0))
        out["claims"][claim.name] = {
            "largest": float(ratios.max()),
            "exceeded": int((ratios > 1 + 1e-9).any(1).sum()),
            "largest_by_n": ratios.max(0).tolist(),
            "largest_by_family": {
                name: float(ratios[check.family == f].max())
                for f, name in enumerate(families.FAMILIES)
            },
            "quantiles": np.quantile(ratios, QUANTILES).tolist(),
            "histogram": np.histogram(logs, edges)[0].tolist(),
        }
    return out


def adversarial_claims(key, *, chunks_and_branches, gammas, progress, **sizes) -> dict:
    """The largest gap / bound that gradient ascent finds for each claim, and the problem."""
    best = {}
    for number, (k, n) in enumerate(progress(chunks_and_branches)):
        found = search.climb(jax.random.fold_in(key, number), gammas=gammas, k=k, n=n, **sizes)
        for c, name in enumerate(claims.NAMES):
            if name not in best or found.ratio[c] > best[name]["ratio"]:
                problem = jax.tree.map(lambda leaf, c=c: leaf[c].tolist(), found.problem)
                best[name] = {
                    "ratio": float(found.ratio[c]),
                    "gamma": float(found.gamma[c]),
                    "k": k,
                    "n": n,
                    "problem": problem._asdict(),
                }
    return best


# --- The trade-off -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("kind", "states", "actions", "k", "n_max", "times"))
def _shifted(keys, policy_size, model_size, gamma, *, kind, states, actions, k, n_max, times):
    """Evaluations of problems whose policy is an improvement step of `policy_size` and whose chunk
    model mixes every row with a random one by `model_size`."""

    def one(key):
        base_key, model_key = jax.random.split(key)
        base = families.random_problem(base_key, kind, states=states, actions=actions, k=k)
        policy = learned.improved_policy(
            base.step, base.reward, base.data_policy, gamma, k, policy_size
        )
        truth = tabular.chunk_kernel(base.step, k)
        other = jax.nn.softmax(4.0 * jax.random.normal(model_key, truth.shape))
        problem = base._replace(
            policy=policy,
            step_model=base.step,
            chunk_model=(1 - model_size) * truth + model_size * other,
        )
        return tabular.evaluate(problem, gamma, k=k, n_max=n_max, times=times)

    return jax.vmap(one)(keys)


def _mean_curves(evaluation, gamma, k) -> dict:
    """Mean exact gap by n with its two parts, the mean bounds by n, and the best n of each."""
    total = np.abs(np.asarray(evaluation.true)[:, None] - np.asarray(evaluation.branch_given))
    parted = np.asarray(evaluation.branch_true_model)
    off_policy = np.abs(np.asarray(evaluation.true)[:, None] - parted)
    model = np.abs(parted - np.asarray(evaluation.branch_given))
    positions = np.asarray(evaluation.chunk_error.branch)
    eps_pi, eps_pi_data = np.asarray(evaluation.eps_pi_worst), np.asarray(evaluation.eps_pi_data)
    curves = {"exact": total, "off_policy_part": off_policy, "model_part": model}
    for bound, policy_error in (("published", eps_pi), ("corrected", eps_pi_data)):
        curves[bound] = np.stack(
            [
                branch_length.branch_length_curve(e, m[:-1], gamma, k, bound=bound)
                for e, m in zip(policy_error, positions)
            ]
        )
    curves["saturating"] = np.stack(
        [
            branch_length.branch_length_curve(
                e, float(m), gamma, k, bound="saturating", n_max=total.shape[1] - 1
            )
            for e, m in zip(eps_pi, np.asarray(evaluation.chunk_error.worst))
        ]
    )
    means = {name: curve.mean(0) for name, curve in curves.items()}
    optimum = {
        name: int(means[name].argmin())
        for name in ("exact", "published", "corrected", "saturating")
    }
    return {
        "n": list(range(total.shape[1])),
        **{name: mean.tolist() for name, mean in means.items()},
        "optimal_n": optimum,
        "eps_pi_worst": float(eps_pi.mean()),
        "eps_m_by_position": positions.mean(0).tolist(),
    }


def trade_off(
    key, *, gamma, k, states, actions, n_max, problems, policy_size, model_size, grid, family,
    progress,
) -> dict:  # fmt: skip
    """Gap against n at one (policy_size, model_size), and maps of the best n over a grid of both:
    rows policy sizes, columns model sizes, `grid` = (smallest, largest, number)."""
    times = tabular.chunk_times(gamma, k, 1e-8)
    keys = jax.random.split(key, problems)
    sizes = dict(kind=families.family(family), states=states, actions=actions, k=k)
    run = functools.partial(_shifted, gamma=gamma, n_max=n_max, times=times, **sizes)
    curves = _mean_curves(run(keys, policy_size, model_size), gamma, k)
    axis = np.geomspace(*grid).tolist()
    maps = {name: [] for name in curves["optimal_n"]}
    regret = {name: [] for name in curves["optimal_n"]}
    for policy in progress(axis):
        rows = [_mean_curves(run(keys, policy, model), gamma, k) for model in axis]
        for name in maps:
            maps[name].append([row["optimal_n"][name] for row in rows])
            # What choosing n by this bound costs: the exact gap there over the smallest one.
            regret[name].append(
                [
                    row["exact"][row["optimal_n"][name]] / max(min(row["exact"]), 1e-15)
                    for row in rows
                ]
            )
    return {"curves": curves, "axis": axis, "maps": maps, "gap_over_best": regret}


# --- Learned models ----------------------------------------------------------------------------

SETTINGS = ("markov", "floor", "phased")


def _learning_problem(key, phased, gamma, policy_size, *, states, actions, k, family):
    """A true problem for the learning study. Phased: the first step of each chunk ignores the
    action and moves by a kernel of its own, which one stationary step model cannot express."""
    base_key, phase_key = jax.random.split(key)
    kind = families.family(family)
    base = families.random_problem(base_key, kind, states=states, actions=actions, k=k)
    step = tabular.per_step(base.step, k)
    first = jax.nn.softmax(4.0 * jax.random.normal(phase_key, (states, 1, states)))
    first = jnp.where(phased, jnp.broadcast_to(first, step.shape[1:]), step[0])
    step = step.at[0].set(first)
    policy = learned.improved_policy(step, base.reward, base.data_policy, gamma, k, policy_size)
    return base._replace(step=step, policy=policy)


@functools.partial(
    jax.jit,
    static_argnames=(
        "states", "actions", "k", "n_max", "horizon", "times", "family", "most", "length",
    ),
)  # fmt: skip
def _learn(
    keys, phased, count, gamma, policy_size, smoothing, floor,
    *, states, actions, k, n_max, horizon, times, family, most, length,
):  # fmt: skip
    def one(key):
        problem_key, data_key = jax.random.split(key)
        problem = _learning_problem(
            problem_key, phased, gamma, policy_size,
            states=states, actions=actions, k=k, family=family,
        )  # fmt: skip
        data = learned.sample_episodes(
            data_key, problem.step, problem.initial, problem.data_policy,
            k=k, episodes=most, length=length,
        )  # fmt: skip
        estimates = (
            learned.with_floor(estimate(data, states, actions, k, smoothing, count), floor)
            for estimate in (learned.estimate_step_model, learned.estimate_chunk_model)
        )
        problem = problem._replace(**dict(zip(("step_model", "chunk_model"), estimates)))
        evaluation = tabular.evaluate(problem, gamma, k=k, n_max=n_max, times=times)
        return evaluation, _horizons(problem, k, horizon)

    return jax.vmap(one)(keys)


def _horizons(problem: ChunkProblem, k: int, horizon: int):
    def kernel(table):
        return tabular.under_policy(problem.policy, table)

    true = kernel(tabular.chunk_kernel(problem.step, k))
    step = kernel(tabular.chunk_kernel(problem.step_model, k))
    errors = functools.partial(learned.horizon_errors, problem.initial, true, horizon=horizon)
    return errors(step), errors(kernel(problem.chunk_model))


def learned_models(
    key, *, gamma, k, states, actions, n_max, horizon, episodes, length, problems, smoothing,
    floor, policy_size, family, progress,
) -> dict:  # fmt: skip
    """ε_m, exact gaps, both bounds and the best n as the number of episodes N grows, in three
    settings: markov (nothing but data is missing), floor (each prediction also errs with
    probability `floor`), phased (the step model is misspecified inside a chunk)."""
    times = tabular.chunk_times(gamma, k, 1e-8)
    keys = jax.random.split(key, problems)
    jobs = [(setting, count) for setting in SETTINGS for count in episodes]
    out = {setting: [] for setting in SETTINGS}
    for setting, count in progress(jobs):
        evaluation, (step_curve, chunk_curve) = _learn(
            keys, setting == "phased", count, gamma, policy_size, smoothing,
            floor if setting == "floor" else 0.0,
            states=states, actions=actions, k=k, n_max=n_max, horizon=horizon, times=times,
            family=family, most=max(episodes), length=length,
        )  # fmt: skip
        out[setting].append(_learned_row(evaluation, step_curve, chunk_curve, gamma, k, count))
    return {
        "episodes": list(episodes),
        "settings": out,
        "crossover": _crossover(out),
        "range": float(2 / (1 - gamma)),
    }


def _learned_row(evaluation, step_curve, chunk_curve, gamma, k, count) -> dict:
    def mean(x):
        return float(np.asarray(x).mean())

    def gap(name):
        truth = np.asarray(evaluation.true)
        values = np.asarray(getattr(evaluation, name))
        return np.abs(truth.reshape(-1, *(1,) * (values.ndim - 1)) - values)

    curves = _mean_curves(evaluation, gamma, k)
    full = bounds.full_horizon(gamma, k)
    corrected = bounds.corrected_full_horizon(gamma, k, rewards="accumulated")
    eps_pi, eps_m = np.asarray(evaluation.eps_pi_worst), np.asarray(evaluation.step_error.data)
    return {
        "episodes": count,
        "eps_m_step": mean(eps_m),
        "eps_m_chunk": mean(evaluation.chunk_error.data),
        "eps_m_composed": mean(evaluation.composed_error.data),
        "horizon_step": np.asarray(step_curve).mean(0).tolist(),
        "horizon_chunk": np.asarray(chunk_curve).mean(0).tolist(),
        "gap_full_accumulated": mean(gap("full_accumulated")),
        "published_full": mean(full.bound(eps_pi, eps_m)),
        "corrected_full": mean(corrected.bound(np.asarray(evaluation.eps_pi_data), eps_m)),
        "gap_branch_chunk": gap("branch_given").mean(0).tolist(),
        "gap_branch_step": gap("branch_composed").mean(0).tolist(),
        "published_branch": curves["published"],
        "corrected_branch": curves["corrected"],
        "optimal_n": {
            **curves["optimal_n"],
            "exact_step_model": int(gap("branch_composed").mean(0).argmin()),
        },
    }


def _crossover(settings) -> dict:
    """The fewest episodes from which on the chunk model errs less per chunk than the composed step
    model, under the data policy; None where it never does."""
    found = {}
    for setting, rows in settings.items():
        better = [row["eps_m_chunk"] < row["eps_m_composed"] for row in rows]
        lasting = [all(better[i:]) for i in range(len(better))]
        found[setting] = rows[lasting.index(True)]["episodes"] if True in lasting else None
    return found


def rounded(value, digits: int = 10):
    """Floats to `digits` significant digits, so that the last bits of a sum do not show."""
    if isinstance(value, dict):
        return {str(key): rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
