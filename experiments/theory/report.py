"""The report: CSV tables, PNG figures and one HTML page whose text is computed from the numbers."""

import base64
import csv
import html
import io
import json
import string
from pathlib import Path

import numpy as np

from experiments.theory import claims, figures, learned, tabular

_PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Compounding error</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; } table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } .bad { color: #c0392b; font-weight: 600; }
pre { background: #f6f6f6; padding: .6em; overflow-x: auto; font-size: 12px; }
</style></head><body>
<h1>Compounding error in chunked, branched rollouts</h1>
$body
<h2>Configuration</h2><pre>$config</pre>
</body></html>
""")


def _ratio(value: float) -> str:
    return f"{value:.4f}" if value < 1000 else "above 1000"


def _list(names) -> str:
    names = list(names)
    return "none" if not names else ", ".join(names)


def _times(value: float) -> str:
    return f"{value:.3g} times"


# --- Paragraphs: what each figure shows --------------------------------------------------------


def case_study_text(results: dict) -> str:
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


def coefficients_text(results: dict, against: str) -> str:
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
        f"on {100 * above:.0f}% of the axis, by up to {_times(ratio[worst])} (at {symbol} = "
        f"{table['axis'][worst]:.4g}). The published branch factor of ε_m is between "
        f"{np.min(published / corrected):.3g} and {np.max(published / corrected):.3g} times the "
        "corrected one for given rewards."
    )


def ratios_text(results: dict) -> str:
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


def trade_off_text(results: dict) -> str:
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
        f"{_times(bound_ratio)} the gap it bounds."
    )


def best_n_text(results: dict) -> str:
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


def learned_errors_text(results: dict) -> str:
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


def learned_gaps_text(results: dict) -> str:
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


def horizon_text(results: dict) -> str:
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


def learned_best_n_text(results: dict) -> str:
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


# (file name, heading, figure, paragraph)
SECTIONS = (
    ("coefficients_n", "Coefficients against n",
     lambda r: figures.coefficients(r, "n"), lambda r: coefficients_text(r, "n")),
    ("coefficients_k", "Coefficients against k",
     lambda r: figures.coefficients(r, "k"), lambda r: coefficients_text(r, "k")),
    ("coefficients_gamma", "Coefficients against γ",
     lambda r: figures.coefficients(r, "gamma"), lambda r: coefficients_text(r, "gamma")),
    ("ratios", "Are the theorems right?", figures.ratios, ratios_text),
    ("trade_off", "The trade-off", figures.trade_off, trade_off_text),
    ("best_n", "The best branch length", figures.best_n_maps, best_n_text),
    ("learned_errors", "Learned models: error", figures.learned_errors, learned_errors_text),
    ("learned_gaps", "Learned models: gap", figures.learned_gaps, learned_gaps_text),
    ("horizon", "Learned models: compounding error", figures.horizon, horizon_text),
    ("learned_best_n", "Learned models: the best branch length",
     figures.learned_best_n, learned_best_n_text),
)  # fmt: skip


# --- Files -------------------------------------------------------------------------------------


def claims_table(results: dict) -> list[dict]:
    """One row per claim: what it says, the largest ratios, and where they were found."""
    rows = []
    for one in claims.CLAIMS:
        random, found = results["random"]["claims"][one.name], results["adversarial"][one.name]
        rows.append(
            {
                "claim": one.name,
                "statement": one.statement,
                "proved": one.holds,
                "largest_random": random["largest"],
                "median_random": random["quantiles"][2],
                "largest_adversarial": found["ratio"],
                "gamma": found["gamma"],
                "k": found["k"],
                "n": found["n"],
            }
        )
    return rows


def tables(results: dict) -> dict[str, list[dict]]:
    """Every table of the report: name -> rows."""
    out = {"claims": claims_table(results)}
    for against, table in results["coefficients"].items():
        names = [name for name in table if name != "axis"]
        out[f"coefficients_{against}"] = [
            {
                against: x,
                **{
                    f"{name}: {error}": table[name][error][i]
                    for name in names
                    for error in ("eps_pi", "eps_m")
                },
            }
            for i, x in enumerate(table["axis"])
        ]
    curves = results["trade_off"]["curves"]
    series = ("n", "exact", "off_policy_part", "model_part", "published", "corrected", "saturating")
    out["trade_off"] = [dict(zip(series, row)) for row in zip(*(curves[name] for name in series))]
    axis = results["trade_off"]["axis"]
    out["best_n"] = [
        {
            "policy_size": policy,
            "model_size": model,
            **{name: grid[i][j] for name, grid in results["trade_off"]["maps"].items()},
        }
        for i, policy in enumerate(axis)
        for j, model in enumerate(axis)
    ]
    out["learned"], out["horizon"] = [], []
    for setting, rows in results["learned"]["settings"].items():
        for row in rows:
            flat = {key: value for key, value in row.items() if np.ndim(value) == 0}
            flat.pop("optimal_n")
            best = {f"optimal_n: {name}": n for name, n in row["optimal_n"].items()}
            out["learned"].append({"setting": setting, **flat, **best})
            out["horizon"] += [
                {"setting": setting, "episodes": row["episodes"], "chunks": h,
                 "step_model": step, "chunk_model": chunk}
                for h, (step, chunk) in enumerate(zip(row["horizon_step"], row["horizon_chunk"]))
            ]  # fmt: skip
    return out


def counterexamples(results: dict) -> dict[str, dict]:
    """The problems that exceed a bound, with what is needed to evaluate them."""
    return {
        name: found for name, found in results["adversarial"].items() if found["ratio"] > 1 + 1e-6
    }


def _counterexample_html(name: str, found: dict) -> str:
    problem = found["problem"]
    policy_rows = learned.chunk_actions(
        np.arange(len(problem["policy"][0])), len(problem["reward"][0]), found["k"]
    )
    lines = [
        f"{key} = {np.array2string(np.array(value), precision=4, suppress_small=True)}"
        for key, value in problem.items()
    ]
    lines.append(f"chunks = {np.asarray(policy_rows).tolist()}")
    return (
        f"<details><summary>{html.escape(name)}: ratio {_ratio(found['ratio'])} at γ = "
        f"{found['gamma']}, k = {found['k']}, n = {found['n']}</summary><pre>"
        f"{html.escape(chr(10).join(lines))}</pre></details>"
    )


def _claims_html(results: dict) -> str:
    head = ("claim", "proved", "largest, random", "largest, adversary", "γ", "k", "n")
    rows = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row in claims_table(results):
        bad = ' class="bad"' if row["largest_adversarial"] > 1 + 1e-6 else ""
        cells = (
            html.escape(row["statement"]), "yes" if row["proved"] else "no",
            _ratio(row["largest_random"]), _ratio(row["largest_adversarial"]),
            row["gamma"], row["k"], row["n"],
        )  # fmt: skip
        rows.append(f"<tr{bad}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def write(results: dict, workdir: Path) -> None:
    """Write results.json, tables/*.csv, figures/*.png, counterexamples/*.json and report.html."""
    for folder in ("tables", "figures", "counterexamples"):
        (workdir / folder).mkdir(parents=True, exist_ok=True)
    _write_json(workdir / "results.json", results)
    for stale in (workdir / "counterexamples").glob("*.json"):
        stale.unlink()
    for name, found in counterexamples(results).items():
        _write_json(workdir / "counterexamples" / f"{name}.json", {"claim": name, **found})
    for name, rows in tables(results).items():
        with (workdir / "tables" / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    body = [f"<p>{html.escape(case_study_text(results))}</p>"]
    for name, heading, draw, describe in SECTIONS:
        buffer = io.BytesIO()
        draw(results).savefig(buffer, format="png")
        (workdir / "figures" / f"{name}.png").write_bytes(buffer.getvalue())
        encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
        body.append(
            f'<h2>{html.escape(heading)}</h2><img alt="{html.escape(heading)}" '
            f'src="data:image/png;base64,{encoded}"><p>{html.escape(describe(results))}</p>'
        )
        if name == "ratios":
            body.append(_claims_html(results))
            body += [_counterexample_html(*item) for item in counterexamples(results).items()]
    config = html.escape(json.dumps(results["config"], indent=1))
    page = _PAGE.substitute(body="\n".join(body), config=config)
    (workdir / "report.html").write_text(page, encoding="utf-8")


def _write_json(path: Path, value) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def load_counterexample(path: Path) -> tuple[dict, tabular.ChunkProblem]:
    """A saved counterexample and its problem, checked; float64 needs `jax.enable_x64`."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    problem = {name: np.array(value) for name, value in found["problem"].items()}
    return found, tabular.chunk_problem(**problem, k=found["k"])
