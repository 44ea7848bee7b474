"""A run's numbers: metrics, intervals, diagnostics, the table; all follow from items.npz, without a model.
Last, how a run is written down and repeated.

symbol  name here    meaning                                                     source
PGR     pgr          performance gap recovered, of accuracies on test            Burns et al. 2023, section 3
ECE     ece          expected calibration error, ten bins of equal count         arXiv 1706.04599
AUROC   auroc        P(a positive ranks above a negative), ties half

Shapes: N items, S seeds. p (N,) is a probability of y = 1, y (N,) is 0/1; right is 0/1.
"""
import hashlib
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.config import Config, problem
from data.stages import digest

ROOT = Path(__file__).resolve().parent.parent


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


def bootstrap(right: np.ndarray, group: np.ndarray, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Paired bootstrap over test items and seeds: right (methods, seeds, N) 0/1, group (N,) -> accuracies
    (draws, methods).

    Items of one group (one passage, one fact in several wordings) are drawn together: they are right or wrong
    together. Every draw resamples groups once for all methods and seeds, and seeds once for all methods, so
    differences of columns are differences on the same items."""
    rng = np.random.default_rng(seed)
    methods, seeds, _ = right.shape
    _, which, size = np.unique(group, return_inverse=True, return_counts=True)
    sums = np.zeros((methods, seeds, len(size)))
    np.add.at(sums, (slice(None), slice(None), which), right)
    out = np.empty((draws, methods))
    for i in range(draws):
        weight = np.bincount(rng.integers(len(size), size=len(size)), minlength=len(size))
        out[i] = (sums @ weight)[:, rng.integers(seeds, size=seeds)].mean(1) / (size @ weight)
    return out


def sign_flip(differences: list[float]) -> float:
    """Two-sided sign-flip p-value of per-seed differences; with S seeds it cannot go below 2 / 2^S. Exact up
    to 16 seeds, beyond by 2^16 random flips, to which the one observed counts."""
    d, least = np.asarray(differences), abs(sum(differences)) - 1e-12
    if len(d) <= 16:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
        return float((np.abs(signs @ d) >= least).mean())
    signs = np.random.default_rng(0).choice((-1, 1), (2 ** 16, len(d)))
    return float(((np.abs(signs @ d) >= least).sum() + 1) / (2 ** 16 + 1))


def diagnose(run: dict, methods) -> dict:
    """Everything said about one seed beside the accuracies; recomputable from items.npz alone."""
    u, t = ({k: torch.as_tensor(v) for k, v in run[part].items() if k not in ("id", "group")}
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
    asked = [np.array([name.rsplit("/", 1)[0] for name in r["test"]["id"].tolist()]) for r in runs]
    order = [np.argsort(ids, kind="stable") for ids in asked]   # another seed may show another candidate, in
    assert all(np.array_equal(ids[o], asked[0][order[0]]) for ids, o in zip(asked, order))  # another place
    right = np.array([[((r["test"][f"p/{m}"] > 0.5) == (r["test"]["truth"] > 0.5))[o]
                       for r, o in zip(runs, order)] for m in methods], float)
    draws = bootstrap(right, runs[0]["test"]["group"][order[0]])
    mean, per_seed = right.mean((1, 2)), right.mean(2)
    at = {m: i for i, m in enumerate(methods)}
    interval = lambda x: [float(q) for q in np.percentile(x, [2.5, 97.5])]      # noqa: E731
    out, gap = {}, None
    if "weak" in at and "ceiling" in at:
        gap = draws[:, at["ceiling"]] - draws[:, at["weak"]]
        defined = mean[at["ceiling"]] - mean[at["weak"]] > 2 * gap.std()
    for m, i in at.items():
        row = {"accuracy": float(mean[i]), "ci95": interval(draws[:, i]), "per_seed": per_seed[i].tolist(),
               "ground_truth_labels": max(r["truth_used"].get(m, r["n"]["labelled"]) for r in runs),
               "pgr": None, "pgr_ci95": None, "attainable": m != "oracle",
               "weights": [r["weights"][m] for r in runs]}
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
    prior = float(np.mean([r["test"]["truth"].mean() for r in runs]))
    return {"methods": out, "class_prior": prior, "majority": max(prior, 1 - prior),
            "test_items": right.shape[2], "test_groups": len(set(runs[0]["test"]["group"].tolist())),
            "seeds": len(runs), "pgr_defined": None if gap is None else bool(defined),
            "gap": None if gap is None else {"mean": float(mean[at["ceiling"]] - mean[at["weak"]]),
                                             "se": float(gap.std())}}


def table(metrics: dict) -> str:
    """The final table, one row per method."""
    span = lambda ci: f"[{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "-"      # noqa: E731
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
                 f"intervals: paired bootstrap over {metrics['test_groups']:,} groups of items"
                 + " and over seeds" * (metrics["seeds"] > 1)
                 + "; * knows the hidden truth: not attainable" * ("oracle" in metrics["methods"]))
    if metrics["pgr_defined"] is False:
        gap = metrics["gap"]
        lines.append(f"PGR undefined: the ceiling is {gap['mean']:+.3f} from the weak model, "
                     f"under 2 standard errors ({gap['se']:.3f})")
    return "\n".join(lines)


def mean_of(rows: list[dict], key: str) -> float:
    """Mean over seeds of those that have the number."""
    return float(np.mean([row[key] for row in rows if row[key] is not None] or [np.nan]))


def write(config: Config, task, counts: dict, sides: dict, stages, runs: list[dict], analysis,
          seconds: float) -> tuple[Path, dict]:
    """<out>/<task>/<run id>/items.npz, then result.json, each under a temporary name first: a result.json is
    always a whole one. sides: weak and strong model; runs: one per seed. Returns folder and result."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])
    sources = {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    settings = asdict(config)
    identity = {k: v for k, v in settings.items() if k not in ("out", "data_dir")}
    run_id = digest(identity, task.sha256, *(side.sha256 for side in sides.values()), sources)[:12]
    folder = Path(config.out) / task.name / run_id
    gpu = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else None
    result = {
        "schema": 1, "command": shlex.join(["python", "selw2s.py", *sys.argv[1:]]), "config": settings,
        "code": sources,
        "data": {"name": task.name, "sha256": task.sha256, "train": len(task.train), "test": len(task.test),
                 **counts},
        "models": {name: {"sha256": side.sha256, "revision": side.model.revision, "lr": side.lr}
                   for name, side in sides.items()},
        "env": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                "device": config.device, "gpu": gpu, "threads": torch.get_num_threads()},
        "stages": stages.log, "seconds": round(seconds, 2), "metrics": summarise(runs, config.methods),
        "seeds": [{k: v for k, v in r.items() if k not in ("transfer", "test")}
                  | {"diagnostics": diagnose(r, config.methods)} for r in runs],
        "analysis": analysis, "finished": True}
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
    return folder, result


INPUTS = ("code", "data", "models", "env")      # what a result depends on beside its configuration


def rerun(config: Config, run) -> None:
    """Repeat the run recorded in a result.json, by run(its config); raises DataError naming what came out
    differently, and what differs of the inputs (code, data, models, environment), where to look."""
    try:
        old = json.loads(Path(config.rerun).read_text("utf-8"))
        recorded = {name: tuple(v) if isinstance(v, list) else v for name, v in old["config"].items()}
        fresh = str(Path(config.out) / f"rerun-{digest(old)[:12]}")     # with a cache of its own
        again = Config(**recorded | {"out": fresh, "data_dir": config.data_dir or recorded["data_dir"]})
        methods, before = dict(old["metrics"]["methods"].items()), {part: old[part] for part in INPUTS}
        if line := problem(again):
            raise ValueError(line)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{config.rerun}: not a result.json of this program ({error})") from None
    new = json.loads(json.dumps(run(again)))
    moved = [part for part in INPUTS if before[part] != new[part]]
    after = new["metrics"]["methods"]
    differ = [name for name in after | methods if methods.get(name) != after.get(name)]
    differ += ["the analysis"] * (old["analysis"] != new["analysis"])
    if differ:
        raise DataError(f"not the same as {config.rerun}: {', '.join(differ)}; "
                        f"differing inputs: {', '.join(moved) or 'none'}")
    print(f"the same as {config.rerun} in every metric and weight"
          + (f", though {', '.join(moved)} differ" if moved else ""))
