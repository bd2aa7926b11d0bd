"""The report: CSV tables, PNG figures and one HTML page whose text is computed from the numbers."""

import base64
import csv
import html
import io
import json
import string
from pathlib import Path

import numpy as np

from experiments.theory import claims, figures, learned, paragraphs, tabular

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


# (file name, heading, figure, paragraph)
SECTIONS = (
    ("coefficients_n", "Coefficients against n",
     lambda r: figures.coefficients(r, "n"), lambda r: paragraphs.coefficients(r, "n")),
    ("coefficients_k", "Coefficients against k",
     lambda r: figures.coefficients(r, "k"), lambda r: paragraphs.coefficients(r, "k")),
    ("coefficients_gamma", "Coefficients against γ",
     lambda r: figures.coefficients(r, "gamma"), lambda r: paragraphs.coefficients(r, "gamma")),
    ("ratios", "Are the theorems right?", figures.ratios, paragraphs.ratios),
    ("trade_off", "The trade-off", figures.trade_off, paragraphs.trade_off),
    ("best_n", "The best branch length", figures.best_n_maps, paragraphs.best_n),
    ("learned_errors", "Learned models: error", figures.learned_errors, paragraphs.learned_errors),
    ("learned_gaps", "Learned models: gap", figures.learned_gaps, paragraphs.learned_gaps),
    ("horizon", "Learned models: compounding error", figures.horizon, paragraphs.horizon),
    ("learned_best_n", "Learned models: the best branch length",
     figures.learned_best_n, paragraphs.learned_best_n),
)  # fmt: skip


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
    body = [f"<p>{html.escape(paragraphs.case_study(results))}</p>"]
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
