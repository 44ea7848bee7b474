"""A run's numbers: metrics, intervals, diagnostics, the table; all follow from items.npz, without a model.

symbol  name here    meaning                                                     source
PGR     pgr          performance gap recovered, of accuracies on test            Burns et al. 2023, section 3
ECE     ece          expected calibration error, ten bins of equal count         method.md, step 4
AUROC   auroc        P(a positive ranks above a negative), ties half

Shapes: N items, S seeds. p (N,) is a probability of y = 1, y (N,) is 0/1; right is 0/1.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of items with (p > 1/2) = y; p (N,) probability, y (N,) 0/1."""
    return float(((p > 0.5) == (y > 0.5)).double().mean())


def cross_entropy(p: Tensor, y: Tensor) -> float:
    """Mean cross-entropy in nats of p (N,) against y (N,) in [0, 1]; p is kept 1e-12 away from 0 and 1."""
    p = p.double().clamp(1e-12, 1 - 1e-12)
    return float(-(y * p.log() + (1 - y) * (1 - p).log()).mean())


def pgr(weak: float, student: float, ceiling: float) -> float | None:
    """Performance gap recovered, (student - weak) / (ceiling - weak); None unless ceiling > weak."""
    return (student - weak) / (ceiling - weak) if ceiling > weak else None


def auroc(p: Tensor, y: Tensor) -> float | None:
    """P(p of a positive > p of a negative), ties count half (average ranks); None with one class only."""
    y = (y > 0.5).double()
    _, which, count = p.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2.0)[which]                     # (N,) average rank, from 1
    n1 = float(y.sum())
    n0 = len(y) - n1
    return float((rank * y).sum() - n1 * (n1 + 1) / 2) / (n1 * n0) if n1 and n0 else None


def brier(p: Tensor, y: Tensor) -> float:
    """Mean squared difference of p (N,) and y (N,)."""
    return float(((p - y).double() ** 2).mean())


def reliability(p: Tensor, y: Tensor, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean p, mean y, count) of equal-count bins in increasing p: the reliability diagram."""
    order = p.argsort(stable=True)
    parts = order.tensor_split(bins)
    return [(float(p[b].double().mean()), float(y[b].double().mean()), len(b)) for b in parts if len(b)]


def ece(p: Tensor, y: Tensor, bins: int = 10) -> float:
    """Expected calibration error over equal-count bins: sum of n_b/N |mean p - mean y|."""
    return sum(n * abs(mean_p - mean_y) for mean_p, mean_y, n in reliability(p, y, bins)) / len(p)


def bootstrap(right: np.ndarray, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Paired bootstrap over test items, seeds: right (methods, seeds, N) 0/1 -> (draws, methods) accuracies.

    Every draw resamples items once for all methods and seeds, and seeds once for all methods, so differences
    of columns are differences on the same items."""
    rng = np.random.default_rng(seed)
    methods, seeds, n = right.shape
    out = np.empty((draws, methods))
    for i in range(draws):
        weight = np.bincount(rng.integers(n, size=n), minlength=n) / n
        out[i] = (right @ weight)[:, rng.integers(seeds, size=seeds)].mean(1)
    return out


def sign_flip(differences: list[float]) -> float:
    """Two-sided exact sign-flip p-value of per-seed differences; with S seeds it cannot go below 2 / 2^S."""
    d = np.asarray(differences)
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(d))).reshape(len(d), -1)
    return float((np.abs(signs.T @ d) >= abs(d.sum()) - 1e-12).mean())


def diagnose(run: dict, methods) -> dict:
    """Everything said about one seed beside the accuracies; recomputable from items.npz alone."""
    u, t = ({k: torch.as_tensor(v) for k, v in run[part].items() if k != "id"}
            for part in ("transfer", "test"))
    routed = u["is_self"]
    parts = {"all": torch.ones_like(routed), "routed": routed, "unrouted": ~routed}
    out = {"coverage": float(routed.double().mean()), "homophily": run["homophily"], "label_accuracy": {},
           "p_ik": {}, "methods": {},
           "class_prior": {"transfer": float(u["truth"].mean()), "test": float(t["truth"].mean())}}
    for key in [k for k in u if k in ("own", "weak", "refined", "smoothed_weak") or k.startswith("label/")]:
        out["label_accuracy"][key] = {part: accuracy(u[key][rows], u["truth"][rows]) if rows.any() else None
                                      for part, rows in parts.items()}
    for name, (p, own_p, right) in {"transfer": (u["p_ik"], u["own_p"], u["own_right"]),
                                    "test": (t["p_ik"], t["own_p"], t["own_right"])}.items():
        order = p.argsort(descending=True, stable=True)
        risk = 1 - right[order].double().cumsum(0) / torch.arange(1, len(p) + 1)
        marks = [max(1, len(p) * i // 20) for i in range(1, 21)]
        out["p_ik"][name] = {
            "own_right": float(right.double().mean()), "own_p_auroc": auroc(own_p, right),
            "own_p_ece": ece(own_p, right), "auroc": auroc(p, right), "brier": brier(p, right),
            "ece": ece(p, right), "reliability": reliability(p, right),
            "risk_coverage": [(m / len(p), float(risk[m - 1])) for m in marks]}
    y, weak = t["truth"].double(), t["p/weak"].double()
    for name in methods:
        s = t[f"p/{name}"].double()
        gain, misfit = ((weak - y) ** 2 - (s - y) ** 2).mean(), ((s - weak) ** 2).mean()
        assert abs(gain - misfit - 2 * ((weak - s) * (s - y)).mean()) < 1e-6    # for any s: arXiv 2405.15116
        wrong, sure = (s > 0.5) != (y > 0.5), (s - 0.5).abs() >= 0.25
        imitates = ((weak > 0.5) == (s > 0.5)) & ((weak - 0.5).abs() >= 0.25)
        row = {"ece": ece(s, y), "brier": brier(s, y), "gain": float(gain), "misfit": float(misfit),
               "confident_wrong_that_imitate_weak": ratio(wrong & sure & imitates, wrong & sure)}
        if "ceiling" in methods:
            known = ((t["p/ceiling"] > 0.5) == (y > 0.5)) & ((t["p/ceiling"] - 0.5).abs() >= 0.25)
            doubtful = (weak - 0.5).abs() < 0.25
            row["known"] = {
                f"{a}-strong {b}-weak": {"n": int((rows_a & rows_b).sum()),
                                         "accuracy": ratio(~wrong & rows_a & rows_b, rows_a & rows_b)}
                for a, rows_a in (("known", known), ("unknown", ~known))
                for b, rows_b in (("known", ~doubtful), ("unknown", doubtful))}
            row["errors_strong_knew"] = ratio(wrong & known, wrong)
            row["blind"] = ratio(wrong & known & doubtful, wrong & ((t["p/ceiling"] > 0.5) == (y > 0.5)))
        out["methods"][name] = row
    return out


def ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None


def summarise(runs: list[dict], methods) -> dict:
    """Accuracy, PGR, difference to naive per method; 95 % intervals: paired bootstrap, items and seeds."""
    right = np.array([[(r["test"][f"p/{m}"] > 0.5) == (r["test"]["truth"] > 0.5) for r in runs]
                      for m in methods], float)
    draws, mean, per_seed = bootstrap(right), right.mean((1, 2)), right.mean(2)
    at = {m: i for i, m in enumerate(methods)}
    interval = lambda x: [float(q) for q in np.percentile(x, [2.5, 97.5])]      # noqa: E731
    out, gap = {}, None
    if "weak" in at and "ceiling" in at:
        gap = draws[:, at["ceiling"]] - draws[:, at["weak"]]
        defined = mean[at["ceiling"]] - mean[at["weak"]] > 2 * gap.std()
    for m, i in at.items():
        n = runs[0]["n"]
        row = {"accuracy": float(mean[i]), "ci95": interval(draws[:, i]), "per_seed": per_seed[i].tolist(),
               "ground_truth_labels": runs[0]["truth_used"].get(m, n["labelled"]), "pgr": None,
               "pgr_ci95": None, "attainable": m != "oracle", "weights": [r["weights"][m] for r in runs]}
        labels = [accuracy(*map(torch.as_tensor, (r["transfer"][f"label/{m}"], r["transfer"]["truth"])))
                  for r in runs if f"label/{m}" in r["transfer"]]
        row["label_accuracy"] = float(np.mean(labels)) if labels else None
        if gap is not None and defined and m not in ("weak", "ceiling"):
            row["pgr"] = pgr(mean[at["weak"]], mean[i], mean[at["ceiling"]])
            rise = draws[:, i] - draws[:, at["weak"]]           # a draw without a gap counts as +-infinite
            span = interval(np.where(gap > 0, rise / np.where(gap > 0, gap, 1), np.copysign(np.inf, rise)))
            row["pgr_ci95"] = span if np.isfinite(span).all() else None
        if "naive" in at and m != "naive":
            difference = per_seed[i] - per_seed[at["naive"]]
            row["minus_naive"] = {"mean": float(difference.mean()),
                                  "ci95": interval(draws[:, i] - draws[:, at["naive"]]),
                                  "sign_flip_p": sign_flip(difference), "smallest_p": 2 / 2 ** len(runs)}
        out[m] = row
    prior = float(np.mean(runs[0]["test"]["truth"]))
    return {"methods": out, "class_prior": prior, "majority": max(prior, 1 - prior),
            "test_items": right.shape[2], "pgr_defined": None if gap is None else bool(defined),
            "gap": None if gap is None else {"mean": float(mean[at["ceiling"]] - mean[at["weak"]]),
                                             "se": float(gap.std())}}


def table(metrics: dict) -> str:
    """The final table, one row per method."""
    span = lambda ci, scale=1: f"[{ci[0] * scale:.3f}, {ci[1] * scale:.3f}]" if ci else "-"     # noqa: E731
    lines = [f"{'method':16}{'accuracy':>9}  {'95 % interval':16} {'PGR':>6}  {'95 % interval':17}"
             f"{'- naive':>8}  {'95 % interval':17}{'labels right':>13}{'truth used':>11}"]
    for name, r in metrics["methods"].items():
        d = r.get("minus_naive")
        lines.append(f"{name + ('' if r['attainable'] else ' *'):16}{r['accuracy']:9.3f}  "
                     f"{span(r['ci95']):16} "
                     f"{'-' if r['pgr'] is None else format(r['pgr'], '.2f'):>6}  {span(r['pgr_ci95']):17}"
                     f"{format(d['mean'], '+.3f') if d else '-':>8}  {span(d['ci95']) if d else '-':17}"
                     f"{'-' if r['label_accuracy'] is None else format(r['label_accuracy'], '.3f'):>13}"
                     f"{r['ground_truth_labels']:>11,}")
    lines.append(f"test: {metrics['test_items']:,} items, majority class {metrics['majority']:.3f}; "
                 "intervals: paired bootstrap over items and seeds"
                 + ("; * needs the hidden truth: an upper bound" if "oracle" in metrics["methods"] else ""))
    if metrics["pgr_defined"] is False:
        gap = metrics["gap"]
        lines.append(f"PGR undefined: the ceiling is {gap['mean']:+.3f} from the weak model, "
                     f"under 2 standard errors ({gap['se']:.3f})")
    return "\n".join(lines)


def analysis_table(name: str, rows: dict[str, list[dict]]) -> str:
    """The means over seeds of every row of an analysis."""
    columns = [c for c in next(iter(rows.values()))[0] if c != "seed"]
    lines = [f"{name:32}" + "".join(f"{c:>16}" for c in columns)]
    for title, metrics in rows.items():
        means = [[m[c] for m in metrics if m[c] is not None] for c in columns]
        lines.append(f"{title:32}" + "".join(f"{np.mean(m):16.3f}" if m else f"{'-':>16}" for m in means))
    return "\n".join(lines)


def write(folder: Path, result: dict, runs: list[dict]) -> None:
    """items.npz, then result.json, each under a temporary name first: a result.json is always a whole one."""
    arrays = {f"seed{r['seed']}/{part}/{name}": array
              for r in runs for part in ("transfer", "test") for name, array in r[part].items()}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False).encode()
    for name, put in (("items.npz", lambda f: np.savez_compressed(f, **arrays)),
                      ("result.json", lambda f: f.write(text))):
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            with open(temporary, "wb") as f:
                put(f)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- figures
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"        # distinct to colour-blind readers and in print


def figures(folder) -> list[str]:
    """Draw a run folder's result.json as SVG beside it; returns the names. ImportError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    matplotlib.rcParams |= {"svg.hashsalt": "selw2s", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False, "legend.frameon": False, "svg.fonttype": "none"}
    folder = Path(folder)
    result = json.loads((folder / "result.json").read_text("utf-8"))
    n, seeds = result["metrics"]["test_items"], len(result["seeds"])
    synthetic = "synthetic demo world, " if result["data"]["name"].startswith("demo") else ""
    caption = (f"{result['data']['name']}: {synthetic}{n:,} test items, {seeds} seed{'s' * (seeds > 1)}\n"
               f"{result['command']}")
    drawn = {"main.svg": draw_main, "p_ik.svg": draw_p_ik, "labels.svg": draw_labels}
    if "selective" in result["metrics"]["methods"]:
        drawn["pipeline.svg"] = draw_pipeline
    if result["analysis"]:
        drawn["analysis.svg"] = {"cross-task": draw_cross_task, "difficulty": draw_difficulty,
                                 "sweep": draw_sweep}[result["config"]["analysis"]]
    for name, draw in drawn.items():
        figure = draw(plt, result)
        figure.text(0.01, 1.01, caption, fontsize=7, color=GREY, ha="left", va="bottom")
        figure.savefig(folder / name, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return list(drawn)


def mean_of(rows: list[dict], key: str) -> float:
    """Mean over seeds of those that have the number."""
    return float(np.mean([row[key] for row in rows if row[key] is not None] or [np.nan]))


def draw_pipeline(plt, result):
    """The method's steps with the counts of this run on its arrows, means over seeds."""
    seeds, methods = result["seeds"], result["metrics"]["methods"]
    d = [seed["diagnostics"] for seed in seeds]
    n = {part: round(np.mean([seed["n"][part] for seed in seeds])) for part in seeds[0]["n"]}
    part = lambda source, rows: mean_of([x["label_accuracy"][source] for x in d], rows)     # noqa: E731
    routed = mean_of(d, "coverage")
    own = mean_of([x["p_ik"]["transfer"] for x in d], "own_right")
    auc = mean_of([x["p_ik"]["transfer"] for x in d], "auroc")
    boxes = {   # name: (x, y, text)
        "data": (0, 1, f"1 questions\nD_l {n['labelled']:,}   D_u {n['transfer']:,}"),
        "weak": (1.5, 2, f"2 weak supervisor\nlabels of D_u: {part('weak', 'all'):.0%} right"),
        "own": (1.5, 0, f"3 strong model's own answers\n{own:.0%} of D_u's questions right"),
        "know": (3.6, 0, f"4 P(IK), linear probe\nAUROC {auc:.2f} on D_u"),
        "route": (3.6, 1, f"5 route: P(IK) >= tau?\nyes: {routed:.0%} of D_u"),
        "smooth": (3.6, 2, f"6 smooth on the kNN graph\nthe others: {part('weak', 'unrouted'):.0%} -> "
                           f"{part('refined', 'unrouted'):.0%} right"),
        "student": (5.4, 1, f"7 student\nlabels: {part('label/selective', 'all'):.0%} right\n"
                            f"test accuracy {methods['selective']['accuracy']:.3f}")}
    arrows = (("data", "weak", "D_l with truth"), ("data", "own", ""), ("own", "know", "hidden states"),
              ("know", "route", ""), ("weak", "smooth", "soft labels"), ("route", "smooth", ""),
              ("route", "student", f"own labels:\n{part('own', 'routed'):.0%} right"),
              ("smooth", "student", "weak labels"))
    figure, ax = plt.subplots(figsize=(11, 3.4))
    drawn = {name: ax.text(x, y, text, fontsize=8, ha="center", va="center", linespacing=1.4, bbox=dict(
        boxstyle="round,pad=0.5", facecolor="white", linewidth=1.5,
        edgecolor=ORANGE if name in ("know", "route", "smooth") else BLUE))
        for name, (x, y, text) in boxes.items()}
    ax.set(xlim=(-0.6, 6.1), ylim=(-0.4, 2.4))
    figure.canvas.draw()    # only now the boxes have a size, and arrows can end at their edges
    for a, b, label in arrows:
        (x0, y0, _), (x1, y1, _) = boxes[a], boxes[b]
        ax.annotate("", (x1, y1), (x0, y0), arrowprops=dict(
            arrowstyle="-|>", color=GREY, shrinkA=0, shrinkB=0, patchA=drawn[a].get_bbox_patch(),
            patchB=drawn[b].get_bbox_patch()))
        ax.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.13, label, fontsize=7, ha="center", va="bottom")
    ax.axis("off")
    return figure


def draw_main(plt, result):
    """Every method's accuracy, 95 % interval and a stroke per seed, between weak model and ceiling."""
    methods = result["metrics"]["methods"]
    names = [m for m in methods if m not in ("weak", "ceiling")]
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(names) + 1.1))
    for name, style, side in (("weak", ":", "right"), ("ceiling", "--", "left")):
        if name in methods:
            axes.axvline(methods[name]["accuracy"], color=GREY, linestyle=style, linewidth=1)
            axes.text(methods[name]["accuracy"], -0.75, f" {name} ", ha=side, va="bottom", color=GREY)
    for row, name in enumerate(names):
        m, colour = methods[name], ORANGE if name == "selective" else BLUE
        axes.plot(m["ci95"], [row, row], color=colour, linewidth=2)
        axes.plot(m["accuracy"], row, "o", color=colour, markersize=7)
        axes.plot(m["per_seed"], [row] * len(m["per_seed"]), "|", color="black", markersize=6,
                  markeredgewidth=0.8)
        if m["pgr"] is not None:
            axes.text(1.01, row, f"PGR {m['pgr']:.2f}", transform=axes.get_yaxis_transform(), va="center",
                      color=colour)
    axes.set_yticks(range(len(names)),
                    [m if methods[m]["attainable"] else m + " (not attainable)" for m in names])
    axes.set_ylim(len(names) - 0.4, -0.8)
    axes.set_xlabel("accuracy on test (bar: 95 % interval over items and seeds; strokes: seeds; "
                    "axis does not start at 0)")
    return figure


def draw_p_ik(plt, result):
    """Reliability diagram and risk-coverage curve of P(IK) on test, one line per seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
    for seed in result["seeds"]:
        p = seed["diagnostics"]["p_ik"]["test"]
        left.plot([b[0] for b in p["reliability"]], [b[1] for b in p["reliability"]], ".-", color=BLUE,
                  alpha=0.6, linewidth=1)
        right.plot(*zip(*p["risk_coverage"]), color=BLUE, alpha=0.6, linewidth=1)
    left.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    left.set(xlabel="P(IK)", ylabel="share of own answers that are right", xlim=(0, 1), ylim=(0, 1))
    aurocs = [s["diagnostics"]["p_ik"]["test"]["auroc"] for s in result["seeds"]]
    mean = np.mean([a for a in aurocs if a is not None] or [np.nan])
    left.set_title(f"reliability, ten bins of equal count (AUROC {mean:.2f})", fontsize=9)
    right.set(xlabel="coverage: questions by falling P(IK)", ylabel="share of own answers wrong",
              xlim=(0, 1), ylim=(0, None))
    right.set_title("risk and coverage", fontsize=9)
    figure.tight_layout()
    return figure


def draw_labels(plt, result):
    """How right the labels of D_u are, by source: on the routed part, on the rest, and over all."""
    names = ("weak", "own", "smoothed_weak", "refined", "label/selective")
    rows = [s["diagnostics"]["label_accuracy"] for s in result["seeds"]]
    names = [name for name in names if name in rows[0]]
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(names) + 1))
    for part, colour, mark in (("all", "black", "o"), ("routed", ORANGE, "^"), ("unrouted", BLUE, "v")):
        values = [[row[name][part] for row in rows if row[name][part] is not None] for name in names]
        axes.plot([np.mean(v) if v else np.nan for v in values], range(len(names)), mark, color=colour,
                  linestyle="", label=part)
    share = np.mean([s["diagnostics"]["coverage"] for s in result["seeds"]])
    axes.set_yticks(range(len(names)), [name.removeprefix("label/").replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=f"part of D_u\n(routed: {share:.0%})")
    axes.set_xlabel("share of labels that are right (axis does not start at 0)")
    return figure


def draw_cross_task(plt, result):
    """A matrix per measure: P(IK) trained on the row's task, used on the column's."""
    rows = result["analysis"]
    names = list(dict.fromkeys(title.split(" -> ")[0] for title in rows))
    measures = {"auroc": "AUROC of P(IK) on D_u", "accuracy": "accuracy of the selective student"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for ax, (key, title) in zip(axes, measures.items()):
        grid = np.array([[mean_of(rows[f"{a} -> {b}"], key) for b in names] for a in names])
        image = ax.imshow(grid, cmap="Greys", vmin=0.5, vmax=1)
        for (i, j), value in np.ndenumerate(grid):
            colour = "white" if value > 0.78 else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
        ax.set_xticks(range(len(names)), [f"used on\n{name}" for name in names], fontsize=6)
        ax.set_yticks(range(len(names)), [f"trained on\n{name}" for name in names], fontsize=6)
        ax.set_title(title, fontsize=9)
        ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def draw_difficulty(plt, result):
    """AUROC of P(IK) on easy and hard questions of D_u, by what it was trained on; a small mark per seed."""
    rows = result["analysis"]
    figure, ax = plt.subplots(figsize=(7, 0.5 * len(rows) + 1))
    for part, colour, mark, shift in (("easy", BLUE, "o", -0.12), ("hard", ORANGE, "^", 0.12)):
        for i, metrics in enumerate(rows.values()):
            values = [m[f"auroc_on_{part}"] for m in metrics if m[f"auroc_on_{part}"] is not None]
            ax.plot(values, [i + shift] * len(values), mark, color=colour, alpha=0.3, markersize=4)
            ax.plot(np.mean(values) if values else np.nan, i + shift, mark, color=colour, markersize=8,
                    label=f"on {part} questions" if i == 0 else None)
    ax.axvline(0.5, color=GREY, linestyle=":", linewidth=1)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("AUROC of P(IK) on D_u (dotted: chance; large marks: mean over seeds)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_sweep(plt, result):
    """Labels, student and the graph's homophily as tau, alpha and k vary; a small mark per seed."""
    rows = result["analysis"]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True)
    for ax, flag in zip(axes, ("tau", "alpha", "k")):
        chosen = {title.split()[1]: row for title, row in rows.items() if title.split()[0] == flag}
        keys = [("label_accuracy", ORANGE, "^", "labels right"), ("accuracy", BLUE, "o", "student right")]
        keys += [("homophily", "black", "s", "homophily")] * (flag == "k")
        for key, colour, mark, label in keys:
            for i, metrics in enumerate(chosen.values()):
                ax.plot([i] * len(metrics), [m[key] for m in metrics], mark, color=colour, alpha=0.3,
                        markersize=3)
            ax.plot([mean_of(metrics, key) for metrics in chosen.values()], mark + "-", color=colour,
                    label=label)
        off = rows["alpha 0 (graph-only)"]
        if flag != "tau":
            ax.axhline(mean_of(off, "label_accuracy"), color=GREY, linestyle=":", linewidth=1,
                       label="labels, no smoothing")
        ax.set_xticks(range(len(chosen)), list(chosen), fontsize=7)
        ax.set_xlabel({"tau": "tau (route-only)", "alpha": "alpha (graph-only, k 10)",
                       "k": "k (graph-only, alpha 0.7)"}[flag])
    axes[0].set_ylabel("share (axis does not start at 0)")
    axes[2].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# ---------------------------------------------------------------------- reference runs and the README
TASKS = ("demo-sciq", "demo-boolq", "demo-cosmosqa")
SEEDS = ("--seeds", "0", "1", "2", "3", "4", "5")
FEW = ("--methods", "ceiling", "naive", "self-only", "route-only", "selective", *SEEDS)
DECISIONS = {       # row of the README's table of decisions: flags of its alternatives
    "D1": (("--own", "mean"), ("--own", "pmi"), ("--own", "judge")), "D2": (("--shots", "4"),),
    "D3": (("--target", "soft"),), "D4": (("--tau", "0.5"), ("--tau", "0.9")), "D5": (("--anchors", "0"),),
    "D6": (("--alpha", "0"), ("--alpha", "0.9", "--k", "10")), "D9": (("--lr", "2e-4"),)}
RESULTS = Path(__file__).resolve().parent / "results"


def decision(flags) -> str:
    """Folder of the run that measures an alternative: decisions/own-mean."""
    return "decisions/" + "-".join(flag.strip("-") for flag in flags)


REFERENCE = {       # folder in data/results: flags of the run, files kept of it
    "demo": ((), ("result.json",)),
    **{task: (("--task", task, "--methods", "all", *SEEDS),
              ("result.json", "items.npz", "main.svg", "p_ik.svg", "labels.svg")) for task in TASKS},
    **{kind: (("--methods", "naive", *SEEDS, "--analysis", kind), ("result.json", "analysis.svg"))
       for kind in ("cross-task", "difficulty", "sweep")},
    **{decision(flags): ((*FEW, *flags), ("result.json",)) for rows in DECISIONS.values() for flags in rows}}


def reference(names) -> None:
    """Make the named reference runs again; keep their files, and what the demo prints."""
    for name in names:
        flags, files = REFERENCE[name]
        print(f"{name}: python selw2s.py {' '.join(flags)}", flush=True)
        out = subprocess.run([sys.executable, "selw2s.py", *flags], cwd=RESULTS.parent.parent, check=True,
                             stdout=subprocess.PIPE, text=True).stdout
        made = RESULTS.parent.parent / re.search(r"^written   (\S+)/ ", out, re.M)[1]
        folder = RESULTS / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(made / file, folder / file)
        if name == "demo":
            (folder / "output.txt").write_text(out, "utf-8")


def kept(name: str) -> dict | None:
    """result.json of a reference run; None if it was not made yet."""
    file = RESULTS / name / "result.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def spread(value, ci) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")


def results_block(_: str) -> str:
    """The README's results: one table for the demo tasks, and what each number rests on."""
    runs = {task: result for task in TASKS if (result := kept(task))}

    def row(name, cell):
        return f"| {name} | " + " | ".join(cell(result) for result in runs.values()) + " |"

    def method(name, key="accuracy", ci="ci95"):
        return lambda r: spread(r["metrics"]["methods"][name][key], r["metrics"]["methods"][name][ci])

    def mean(get):
        return lambda r: f"{np.mean([get(seed['diagnostics']) for seed in r['seeds']]):.3f}"
    titles = {"selective": "**selective**", "oracle": "oracle (not attainable)"}
    lines = [row("accuracy on test [95 % interval]", lambda r: r["data"]["name"]),
             "|---" * (len(runs) + 1) + "|"]
    lines += [row(titles.get(m, m), method(m)) for m in next(iter(runs.values()))["metrics"]["methods"]]
    lines += [row(f"PGR of {m}", method(m, "pgr", "pgr_ci95")) for m in ("naive", "selective")]
    lines += [row("selective - naive", lambda r: spread(
        *(r["metrics"]["methods"]["selective"]["minus_naive"][key] for key in ("mean", "ci95"))))]
    lines += [row(name, mean(get)) for name, get in (
        ("P(IK): AUROC on test", lambda d: d["p_ik"]["test"]["auroc"]),
        ("own label used on D_u", lambda d: d["coverage"]),
        *((f"{name} labels right", lambda d, key=key: d["label_accuracy"][key]["all"]) for name, key in (
            ("weak", "weak"), ("own", "own"), ("smoothed weak", "smoothed_weak"),
            ("selective's", "label/selective"))))]
    lines += [row("majority class", lambda r: f"{r['metrics']['majority']:.3f}"),
              row("test items, seeds", lambda r: f"{r['metrics']['test_items']:,}, {len(r['seeds'])}"),
              row("result", lambda r: f"[json](data/results/{r['data']['name']}/result.json)")]
    return ("Reference runs on the **synthetic** demo world (data/world.py says how it was made and tuned); "
            "intervals: paired\nbootstrap over test items and seeds.\n\n"
            "![accuracy of every method on demo-sciq](data/results/demo-sciq/main.svg)\n\n" + "\n".join(lines)
            + "\n\nMade by `python -m data.report --reference`, that is\n\n"
            + "\n".join(f"    {result['command']}" for result in runs.values()))


def analysis_block(_: str) -> str:
    """P(IK) across tasks and difficulties."""
    cross, hard = kept("cross-task"), kept("difficulty")
    if not cross or not hard:
        return "Not run yet; `--analysis cross-task` and `--analysis difficulty` make it."

    def means(rows, *keys):
        found = [[row[key] for row in rows if row[key] is not None] for key in keys]
        return ", ".join(f"{np.mean(values):.2f}" if values else "-" for values in found)
    lines = ["| P(IK) trained on | " + " | ".join(f"used on {b}" for b in TASKS) + " |",
             "|---" * (len(TASKS) + 1) + "|"]
    for a in TASKS:
        cells = (means(cross["analysis"][f"{a} -> {b}"], "auroc", "ece", "accuracy") for b in TASKS)
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    lines += ["", "AUROC and ECE on D_u, accuracy of the selective student; six seeds. On demo-sciq:",
              "", "| P(IK) trained on | AUROC on easy items | AUROC on hard items | selective student |",
              "|---|---|---|---|"]
    for name, rows in hard["analysis"].items():
        cells = means(rows, "auroc_on_easy", "auroc_on_hard", "accuracy").replace(", ", " | ")
        lines.append(f"| {name.removeprefix('trained on ')} items of D_l | {cells} |")
    return "\n".join(lines)


def decisions_block(text: str) -> str:
    """The table of decisions, its last column filled in: effect on demo-sciq's selective student."""
    base, out = kept("demo-sciq")["metrics"]["methods"]["selective"], []
    for line in text.splitlines():
        tag, effects = re.match(r"\| (D\d+) \|", line), []
        for flags in DECISIONS.get(tag[1], ()) if tag else ():
            if other := kept(decision(flags)):
                per_seed = other["metrics"]["methods"]["selective"]["per_seed"]
                effects.append(f"`{' '.join(flags)}` {np.subtract(per_seed, base['per_seed']).mean():+.3f}")
        cells = [*line.split(" | ")[:4], (", ".join(effects) or "not measured") + " |"]
        out.append(" | ".join(cells) if tag else line)
    return "\n".join(out)


def readme(text: str) -> str:
    """README.md with every part between <!-- name --> and <!-- end --> made anew from data/results."""
    printed = (RESULTS / "demo/output.txt").read_text("utf-8").splitlines()
    parts = {"results": results_block, "analysis": analysis_block, "decisions": decisions_block,
             "output": lambda _: "\n".join("    " + line for line in printed)}
    return re.sub(r"<!-- (\w+) -->\n(.*?)<!-- end -->",
                  lambda m: f"<!-- {m[1]} -->\n{parts[m[1]](m[2])}\n<!-- end -->", text, flags=re.S)


def main() -> None:
    """python -m data.report [--reference [NAME ...]]: (make the runs and) write the README."""
    if sys.argv[1:2] == ["--reference"]:
        reference(sys.argv[2:] or REFERENCE)
    path = RESULTS.parent.parent / "README.md"
    path.write_text(readme(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
