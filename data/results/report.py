"""What a run says: diagnostics of each seed, the summary over seeds, the table.

All of it follows, without a model, from what selw2s.record keeps of each seed: the arrays of items.npz, and a
few numbers that stand in result.json (homophily, cross-fitted accuracy, sizes, truth used).
"""
import textwrap
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from data.results.metrics import (accuracy, auroc, bootstrap, brier, ece, interval, pgr, pgr_interval, ratio,
                                  reliability, sign_flip, squared_error)


def described(config) -> str:
    """The resolved selw2s.Config as the program prints it first."""
    words = []
    for name, value in asdict(config).items():
        if value not in ("", ()):
            words.append(f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return textwrap.fill("config    " + " ".join(words), 110, subsequent_indent=" " * 10,
                         break_long_words=False, break_on_hyphens=False)


def data_line(task, counts: dict[str, int], room: int, synthetic: bool) -> str:
    """What is told of a data.Task, of which fit changed and left out so many questions."""
    line = f"data      {task.name}: {len(task.train):,} train and {len(task.test):,} test questions"
    if synthetic:
        line += " (synthetic world, see data/world.py)"
    if task.repeated:
        line += f"; {task.repeated} option(s) repeat another of their question and count once"
    if counts["left_out"]:
        line += f"; {counts['left_out']} of train left out: test has them"
    if counts["cut"]:
        line += f"; {counts['cut']} contexts cut to fit {room} tokens"
    return line


def p_ik_line(routers: dict, known, right: Tensor, layers: int) -> str:
    """What is told of step 4: selw2s.Known by router, the one used; right (n,) of D_l; hidden states read."""
    areas = [f"{router} {shown(auroc(k.learn, right.double()), '.3f')}" for router, k in routers.items()]
    where = "" if known.router == "belief" else f"layer read {known.layer + 1} of {layers}, "
    return (f"4 P(IK)    held-out AUROC on D_l: {', '.join(areas)} ({known.router} used, "
            f"{where}l2 {known.probe.l2:g})")


def smoothing_line(chosen, auto: bool) -> str:
    """What is told of step 6, of a selw2s.Smoothing."""
    if chosen.before is None:
        return f"6 smooth   no label of D_l is left to choose by: alpha {chosen.alpha:g}"
    off = " (off: no smoothing helps there)" if chosen.alpha == 0 and auto else ""
    return (f"6 smooth   alpha {chosen.alpha:g}, k {chosen.k}: accuracy of D_l's unrouted labels "
            f"{chosen.before:.3f} -> {chosen.after:.3f}{off}")


def diagnose(run: dict, methods) -> dict:
    """Everything said about one seed beside the accuracies."""
    u, t = ({k: torch.as_tensor(v) for k, v in run[part].items() if k not in ("id", "group")}
            for part in ("transfer", "test"))
    routed = u["is_self"]
    where = {"all": torch.ones_like(routed), "routed": routed, "unrouted": ~routed}
    labels = {}
    for key in u:
        if key in ("own", "weak", "refined", "smoothed_weak") or key.startswith(("label/", "weak/")):
            labels[key] = {part: share_right(u[key][at], u["truth"][at]) for part, at in where.items()}
    return {"coverage": float(routed.double().mean()), "homophily": run["homophily"],
            "label_accuracy": labels,
            "p_ik": {"transfer": diagnose_p_ik(u["p_ik"], u), "test": diagnose_p_ik(t["p_ik"], t)},
            "routers": diagnose_routers(u, t),
            "methods": {name: diagnose_student(name, t) for name in methods if predicts([run], name)},
            "class_prior": {"transfer": float(u["truth"].mean()), "test": float(t["truth"].mean())}}


def share_right(labels: Tensor, truth: Tensor) -> float | None:
    """Accuracy of labels (n,), those that are NaN left out; None of nothing."""
    there = ~labels.isnan()
    return accuracy(labels[there], truth[there]) if there.any() else None


def diagnose_routers(transfer: dict[str, Tensor], test: dict[str, Tensor]) -> dict:
    """AUROC, Brier, ECE of P(IK) by every router, and the share of D_u where it is at least tau."""
    out = {}
    for key in [key for key in transfer if key.startswith("p_ik/")]:
        out[key.removeprefix("p_ik/")] = {
            "coverage": float((transfer[key] >= transfer["tau"]).double().mean()),
            **{part: {name: measure(arrays[key], arrays["own_right"])
                      for name, measure in (("auroc", auroc), ("brier", brier), ("ece", ece))}
               for part, arrays in (("transfer", transfer), ("test", test))}}
    return out


def diagnose_p_ik(p: Tensor, part: dict[str, Tensor]) -> dict:
    """How well P(IK) (n,), and the own answer's probability in its place, tell right answers from wrong."""
    own_p, right = part["own_p"], part["own_right"]
    order = p.argsort(descending=True, stable=True)
    risk = 1 - right[order].double().cumsum(0) / torch.arange(1, len(p) + 1)
    marks = [max(1, len(p) * i // 20) for i in range(1, 21)]
    return {"own_right": float(right.double().mean()), "own_p_auroc": auroc(own_p, right),
            "own_p_ece": ece(own_p, right), "auroc": auroc(p, right), "brier": brier(p, right),
            "ece": ece(p, right), "reliability": reliability(p, right),
            "risk_coverage": [(m / len(p), float(risk[m - 1])) for m in marks]}


def diagnose_student(name: str, t: dict[str, Tensor]) -> dict:
    """Calibration of one method on test; where weak labels are there, gain and misfit (arXiv 2405.15116),
    imitation of weak errors, and with a ceiling the table of what strong and weak model know."""
    y, weak, s = (t[key].double() for key in ("truth", "p/weak", f"p/{name}"))
    if weak.isnan().any():
        return {"ece": ece(s, y), "brier": brier(s, y)}
    gain, misfit = ((weak - y) ** 2 - (s - y) ** 2).mean(), ((s - weak) ** 2).mean()
    assert abs(gain - misfit - 2 * ((weak - s) * (s - y)).mean()) < 1e-6        # for any s: arXiv 2405.15116
    wrong, sure = (s > 0.5) != (y > 0.5), (s - 0.5).abs() >= 0.25
    doubtful = (weak - 0.5).abs() < 0.25
    imitates = ((weak > 0.5) == (s > 0.5)) & ~doubtful
    row = {"ece": ece(s, y), "brier": brier(s, y), "gain": float(gain), "misfit": float(misfit),
           "confident_wrong_that_imitate_weak": ratio(wrong & sure & imitates, wrong & sure)}
    if "p/ceiling" in t:
        right = (t["p/ceiling"] > 0.5) == (y > 0.5)
        known = right & ((t["p/ceiling"] - 0.5).abs() >= 0.25)
        row["known"] = {}
        for strong, at in (("known", known), ("unknown", ~known)):
            for word, of_weak in (("known", ~doubtful), ("unknown", doubtful)):
                row["known"][f"{strong}-strong {word}-weak"] = {
                    "n": int((at & of_weak).sum()), "accuracy": ratio(~wrong & at & of_weak, at & of_weak)}
        row["errors_strong_knew"] = ratio(wrong & known, wrong)
        row["blind"] = ratio(wrong & known & doubtful, wrong & right)
    return row


def right_by_method(runs: list[dict], methods) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong (methods, seeds, N) 0/1 and group (N,) of the test questions, joined by question id."""
    asked = [np.array([name.rsplit("/", 1)[0] for name in r["test"]["id"].tolist()]) for r in runs]
    order = [np.argsort(ids, kind="stable") for ids in asked]   # another seed may show another candidate, in
    assert all(np.array_equal(ids[o], asked[0][order[0]]) for ids, o in zip(asked, order))  # another place
    right = np.array([[((r["test"][f"p/{m}"] > 0.5) == (r["test"]["truth"] > 0.5))[o]
                       for r, o in zip(runs, order)] for m in methods], float)
    return right, runs[0]["test"]["group"][order[0]]


def mean_label_accuracy(runs: list[dict], method: str) -> float | None:
    """Mean over seeds of the share of a method's training labels that agree with the truth of D_u."""
    found = [share_right(*map(torch.as_tensor, (r["transfer"][f"label/{method}"], r["transfer"]["truth"])))
             for r in runs if f"label/{method}" in r["transfer"]]
    return float(np.mean(found)) if found else None


def supervisor_views(runs: list[dict]) -> dict:
    """The weak supervisor as D_l's cross-fitted labels show it and as it is on D_u: mean accuracies over
    seeds, and their difference in standard errors."""
    seen, real, variance = 0.0, 0.0, 0.0
    for r in runs:
        u = r["transfer"]
        right = (u["weak"] > 0.5) == (u["truth"] > 0.5)
        seen, real = seen + r["cross_fitted"] / len(runs), real + right.mean() / len(runs)
        variance += (r["cross_fitted_error"] ** 2 + squared_error(right, u["group"])) / len(runs) ** 2
    return {"cross_fitted": seen, "actual": real, "trained": all(r["trained"] for r in runs),
            "standard_errors": (seen - real) / max(variance ** 0.5, 1e-9)}


def predicts(runs: list[dict], method: str) -> bool:
    """Whether a method says something of every test item: weak labels that came with a file need not."""
    return not any(np.isnan(r["test"][f"p/{method}"]).any() for r in runs)


def summarise(runs: list[dict], methods) -> dict:
    """Accuracy, PGR, differences to naive and to the untouched strong model per method; 95 % intervals:
    paired bootstrap, items and seeds. None where a method does not predict the test items."""
    known = [m for m in methods if predicts(runs, m)]
    right, group = right_by_method(runs, known)
    draws = dict(zip(known, bootstrap(right, group).T))         # (draws,) per method
    mean, per_seed = dict(zip(known, right.mean((1, 2)))), dict(zip(known, right.mean(2)))
    gap, size, defined = None, None, False
    if "weak" in mean and "ceiling" in mean:
        gap, size = draws["ceiling"] - draws["weak"], mean["ceiling"] - mean["weak"]
        defined = bool(size > 2 * gap.std())
    out = {}
    for m in methods:
        row = {"accuracy": None, "ci95": None, "per_seed": None,
               "ground_truth_labels": max(r["truth_used"].get(m, r["n"]["labelled"]) for r in runs),
               "pgr": None, "pgr_ci95": None, "attainable": m != "oracle",
               "weights": [r["weights"][m] for r in runs], "label_accuracy": mean_label_accuracy(runs, m)}
        out[m] = row
        if m not in known:
            continue
        row |= {"accuracy": float(mean[m]), "ci95": interval(draws[m]), "per_seed": per_seed[m].tolist()}
        if defined and m not in ("weak", "ceiling"):
            row["pgr"] = pgr(mean["weak"], mean[m], mean["ceiling"])
            row["pgr_ci95"] = pgr_interval(draws[m] - draws["weak"], gap)
        for other in ("naive", "zero-shot"):
            if other in mean and m != other:
                difference = per_seed[m] - per_seed[other]
                row[f"minus_{other}"] = {
                    "mean": float(difference.mean()), "ci95": interval(draws[m] - draws[other]),
                    "sign_flip_p": sign_flip(difference), "smallest_p": 2 / 2 ** len(runs)}
    prior = float(np.mean([r["test"]["truth"].mean() for r in runs]))
    return {"methods": out, "supervisor": supervisor_views(runs), "class_prior": prior,
            "majority": max(prior, 1 - prior), "test_items": right.shape[2],
            "test_groups": len(set(group.tolist())), "seeds": len(runs),
            "pgr_defined": None if gap is None else defined,
            "gap": None if gap is None else {"mean": float(size), "se": float(gap.std())}}


def shown(value: float | None, form: str) -> str:
    """A number of the table, "-" where there is none."""
    return "-" if value is None else format(value, form)


def span(ci: list[float] | None) -> str:
    """An interval of the table."""
    return f"[{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "-"


def table(metrics: dict) -> str:
    """The final table, one row per method."""
    lines = [f"{'method':15}{'accuracy':>8}  {'95 % interval':15}{'PGR':>5}  {'95 % interval':16}"
             f"{'- naive':>7}  {'95 % interval':16}{'- zero-shot':>11}{'labels':>7}{'truth':>6}"]
    none = {"mean": None, "ci95": None}
    for name, r in metrics["methods"].items():
        naive, untouched = r.get("minus_naive", none), r.get("minus_zero-shot", none)
        title = name if r["attainable"] else name + " *"
        lines.append(f"{title:15}{shown(r['accuracy'], '.3f'):>8}  {span(r['ci95']):15}"
                     f"{shown(r['pgr'], '.2f'):>5}  {span(r['pgr_ci95']):16}"
                     f"{shown(naive['mean'], '+.3f'):>7}  {span(naive['ci95']):16}"
                     f"{shown(untouched['mean'], '+.3f'):>11}{shown(r['label_accuracy'], '.3f'):>7}"
                     f"{r['ground_truth_labels']:>6}")
    return "\n".join([*lines, *remarks(metrics)])


def remarks(metrics: dict) -> list[str]:
    """What has to be known to read the table."""
    n, groups = metrics["test_items"], metrics["test_groups"]
    lines = [f"test: {n:,} items, majority class {metrics['majority']:.3f}; intervals: paired bootstrap over "
             f"{groups:,} groups of items",
             "labels: share of its training labels that are right; truth: ground-truth labels it used"]
    if metrics["seeds"] > 1:
        lines[0] += " and over seeds"
    if "oracle" in metrics["methods"]:
        lines[0] += "; * knows the hidden truth: not attainable"
    view = metrics["supervisor"]
    made, remedy = ("cross-fitted", "; use more --folds") if view["trained"] else ("labels as they came", "")
    lines.append(f"weak supervisor: {view['cross_fitted']:.3f} right on D_l, {made}; "
                 f"{view['actual']:.3f} on D_u")
    if abs(view["standard_errors"]) > 3:
        lines.append(f"WARNING: these differ by {abs(view['standard_errors']):.1f} standard errors: what was "
                     f"chosen on D_l was chosen for another supervisor{remedy}")
    if metrics["pgr_defined"] is False:
        gap = metrics["gap"]
        lines.append(f"PGR undefined: the ceiling is {gap['mean']:+.3f} from the weak model, "
                     f"under 2 standard errors ({gap['se']:.3f})")
    return lines
