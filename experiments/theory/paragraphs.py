"""Paragraphs of the compounding-error report, computed from the numbers. Each takes `results` and
returns the text of the figure of its name; `case_study` opens the report."""

import numpy as np

from experiments.theory import claims


def _list(names) -> str:
    return ", ".join(names) or "none"


def case_study(results: dict) -> str:
    config, case = results["config"], results["case_study"]
    full, branch = case["full"], case["branched"]
    sharp = results["corrected_case_study"]
    return (
        f"At γ = {config['gamma']}, k = {config['k']} and r_max = {config['r_max']} the published "
        f"full-horizon bound is {full['eps_pi']} ε_π + {full['eps_m']} ε_m, and the published "
        f"bound for branches of {branch['n']} chunks {branch['eps_pi']} ε_π + {branch['eps_m']} "
        "ε_m. The bounds that are proved are: "
        + "; ".join(
            f"{name}: {value['eps_pi']:.1f} ε_π + {value['eps_m']:.1f} ε_m"
            for name, value in sharp.items()
        )
        + ". ε_m is per step for full horizons and for accumulated rewards, per chunk otherwise."
    )


def coefficients(results: dict, against: str) -> str:
    table = results["coefficients"][against]
    first, last = table["axis"][0], table["axis"][-1]
    published = np.array(table["published branch"]["eps_m"])
    corrected = np.array(table["corrected branch, given"]["eps_m"])
    full = np.array(table["published full"]["eps_m"])
    accumulated = np.array(table["corrected full, accumulated"]["eps_m"])
    if against == "n":
        return (
            f"From n = {first} to {last} the published factor of ε_m grows without limit, to "
            f"{published[-1]:.4g}; the corrected one for given rewards saturates, at "
            f"{corrected[-1]:.4g}, since a chunk late in an episode is discounted. The factor of "
            f"ε_π falls from {table['published branch']['eps_pi'][0]:.4g} to "
            f"{table['published branch']['eps_pi'][-1]:.4g} (published) and from "
            f"{table['corrected branch, given']['eps_pi'][0]:.4g} to "
            f"{table['corrected branch, given']['eps_pi'][-1]:.4g} (corrected): the corrected "
            "factor at n is the published one at n + 1."
        )
    ratio = accumulated / np.maximum(full, 1e-300)
    symbol = {"k": "k", "gamma": "γ"}[against]
    worst = int(np.argmax(ratio))
    above = float((ratio > 1 + 1e-12).mean())
    return (
        f"Against {symbol}, from {first:.4g} to {last:.4g}: when step rewards are accumulated in "
        "the model, the factor of ε_m that holds for a full horizon exceeds the published one "
        f"on {100 * above:.0f}% of the axis, by up to {ratio[worst]:.3g} times (at {symbol} = "
        f"{table['axis'][worst]:.4g}). The published branch factor of ε_m is between "
        f"{np.min(published / corrected):.3g} and {np.max(published / corrected):.3g} times the "
        "corrected one for given rewards."
    )


def ratios(results: dict) -> str:
    random, adversarial = results["random"], results["adversarial"]
    exceeded = [one.name for one in claims.CLAIMS if adversarial[one.name]["ratio"] > 1 + 1e-6]
    random_exceeded = [
        one.name for one in claims.CLAIMS if random["claims"][one.name]["exceeded"] > 0
    ]
    corrected = [one for one in claims.CLAIMS if one.family == "corrected"]
    tightest = max(corrected, key=lambda one: adversarial[one.name]["ratio"])
    loosest = min(corrected, key=lambda one: adversarial[one.name]["ratio"])
    median = np.median([random["claims"][one.name]["quantiles"][2] for one in corrected])
    broken = [name for name in exceeded if name.startswith("corrected")]
    verdict = (
        "No corrected bound was exceeded."
        if not broken
        else f"CORRECTED BOUNDS EXCEEDED: {_list(broken)}."
    )
    return (
        f"{random['problems']:,} random problems (γ = {random['gamma']}, n in {random['ns']}) "
        f"exceed: {_list(random_exceeded)}. Gradient ascent over the MDP, its models and both "
        f"policies exceeds: {_list(exceeded)}. {verdict} The adversary brings the gap to between "
        f"{adversarial[loosest.name]['ratio']:.4f} ({loosest.name}) and "
        f"{adversarial[tightest.name]['ratio']:.4f} ({tightest.name}) of a corrected bound, so "
        "their constants cannot be lowered by much; on random problems the median gap is only "
        f"{median:.2g} of the bound. Random problems alone would not have found the broken ones."
        if len(random_exceeded) < len(exceeded)
        else f"{random['problems']:,} random problems exceed: {_list(random_exceeded)}; gradient "
        f"ascent exceeds: {_list(exceeded)}. {verdict} On random problems the median gap is "
        f"{median:.2g} of a corrected bound; the adversary reaches "
        f"{adversarial[tightest.name]['ratio']:.4f} of {tightest.name}."
    )


def trade_off(results: dict) -> str:
    curves = results["trade_off"]["curves"]
    best = curves["optimal_n"]
    exact, last = curves["exact"], curves["n"][-1]
    smallest = exact[best["exact"]]
    bound_ratio = curves["corrected"][best["corrected"]] / max(exact[best["corrected"]], 1e-300)
    return (
        f"With ε_π = {curves['eps_pi_worst']:.3f} and a chunk error of "
        f"{curves['eps_m_by_position'][0]:.3f} at the branch's start, the exact gap is "
        f"{exact[0]:.3g} without imagination (n = 0), smallest at n* = {best['exact']} "
        f"({smallest:.3g}) and {exact[-1]:.3g} at n = {last}. The off-policy part falls from "
        f"{curves['off_policy_part'][0]:.3g} to {curves['off_policy_part'][-1]:.3g} while the "
        f"model part rises from {curves['model_part'][0]:.3g} to {curves['model_part'][-1]:.3g}. "
        f"The bounds recommend n = {best['published']} (published), {best['corrected']} "
        f"(corrected) and {best['saturating']} (saturating), where the exact gap is "
        f"{exact[best['published']]:.3g}, {exact[best['corrected']]:.3g} and "
        f"{exact[best['saturating']]:.3g}. At its optimum the corrected bound is "
        f"{bound_ratio:.3g} times the gap it bounds."
    )


def best_n(results: dict) -> str:
    study = results["trade_off"]
    exact = np.array(study["maps"]["exact"])
    longest = study["curves"]["n"][-1]
    parts = []
    for name in ("published", "corrected", "saturating"):
        chosen, cost = np.array(study["maps"][name]), np.array(study["gap_over_best"][name])
        inside = np.mean((chosen > 0) & (chosen < longest))
        parts.append(
            f"{name}: right in {100 * np.mean(chosen == exact):.0f}% of the cells, strictly "
            f"between 0 and {longest} in {100 * inside:.0f}%, its gap a factor "
            f"{np.median(cost):.2f} from the best in the median and {cost.max():.3g} at worst"
        )
    inside = np.mean((exact > 0) & (exact < longest))
    return (
        f"The exact n* lies strictly between 0 and {longest} in {100 * inside:.0f}% of the "
        "cells. By bound, " + "; ".join(parts) + ". With errors that do not grow along the branch "
        "the corrected and saturating bounds only ever choose the shortest or the longest branch "
        "(compare ε_m with ε_π); what makes an interior optimum is a model error that does grow, "
        "or the slack of the published bound."
    )


def _each_setting(results: dict, describe) -> str:
    return " ".join(
        f"{setting.capitalize()}: {describe(rows)}"
        for setting, rows in results["learned"]["settings"].items()
    )


def learned_errors(results: dict) -> str:
    crossover = results["learned"]["crossover"]
    text = _each_setting(
        results,
        lambda rows: (
            f"per chunk, the composed step model errs by {rows[0]['eps_m_composed']:.3g} at N = "
            f"{rows[0]['episodes']} and {rows[-1]['eps_m_composed']:.3g} at N = "
            f"{rows[-1]['episodes']}, the chunk model by {rows[0]['eps_m_chunk']:.3g} and "
            f"{rows[-1]['eps_m_chunk']:.3g}."
        ),
    )
    wins = [f"in {setting} from N = {count} on" for setting, count in crossover.items() if count]
    never = [setting for setting, count in crossover.items() if count is None]
    return (
        text + f" Frame skipping wins {_list(wins) if wins else 'nowhere'}; it never does in: "
        f"{_list(never)}. A chunk model has A^k actions to learn from one observation per chunk; "
        "it pays when the step model has an error that data does not remove."
    )


def learned_gaps(results: dict) -> str:
    n, span = results["config"]["n"], results["learned"]["range"]
    text = _each_setting(
        results,
        lambda rows: (
            f"at N = {rows[-1]['episodes']} the exact gaps are "
            f"{rows[-1]['gap_full_accumulated']:.3g} (step model, full horizon), "
            f"{rows[-1]['gap_branch_step'][n]:.3g} (step model, n = {n}) and "
            f"{rows[-1]['gap_branch_chunk'][n]:.3g} (chunk model, n = {n}); the corrected bounds "
            f"{rows[-1]['corrected_full']:.4g} and {rows[-1]['corrected_branch'][n]:.4g}."
        ),
    )
    return text + (
        f" All returns lie within a range of {span:.4g}, so a bound above that says nothing; the "
        "bounds order the methods, they do not predict the gap."
    )


def horizon(results: dict) -> str:
    def describe(rows):
        step, chunk = np.array(rows[-1]["horizon_step"]), np.array(rows[-1]["horizon_chunk"])
        better = "chunk" if chunk[-1] < step[-1] else "step"
        return (
            f"at N = {rows[-1]['episodes']} the step model is off by {step[1]:.3g} after one chunk "
            f"and at most {step.max():.3g} later, the chunk model by {chunk[1]:.3g} and "
            f"{chunk.max():.3g}; after {len(step) - 1} chunks the {better} model is closer."
        )

    return _each_setting(results, describe) + (
        " Errors do not grow linearly for ever: once both chains have forgotten where they "
        "started, what remains is the difference of their stationary distributions."
    )


def learned_best_n(results: dict) -> str:
    return _each_setting(
        results,
        lambda rows: (
            f"from N = {rows[0]['episodes']} to {rows[-1]['episodes']} the exact n* moves from "
            f"{rows[0]['optimal_n']['exact']} to {rows[-1]['optimal_n']['exact']} (chunk model) "
            f"and from {rows[0]['optimal_n']['exact_step_model']} to "
            f"{rows[-1]['optimal_n']['exact_step_model']} (step model); by the published bound "
            f"from {rows[0]['optimal_n']['published']} to {rows[-1]['optimal_n']['published']}, "
            f"by the corrected from {rows[0]['optimal_n']['corrected']} to "
            f"{rows[-1]['optimal_n']['corrected']}, by the saturating from "
            f"{rows[0]['optimal_n']['saturating']} to {rows[-1]['optimal_n']['saturating']}."
        ),
    )
