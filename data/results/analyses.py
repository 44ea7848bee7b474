"""What P(IK) does beyond one task: --analysis cross-task, difficulty, sweep (paper, abstract); what the weak
models' representations lack: --analysis representation.

Each analysis gives {row title: [metrics of each seed]} and asks for the steps of selw2s, which is imported
when one runs: it imports this module. With --methods weak none but representation trains students.
"""
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from data import DEMO, OFFICIAL, DataError
from data.results.metrics import accuracy, auroc, ece, hidden_truth, mean_of, own_right, right_option


def student_metrics(setup, prep, known, method: str = "selective") -> dict:
    """Metrics of P(IK) on prep's data, of a method's labels with it and, unless --methods names no student,
    of its student on test."""
    import selw2s
    s, p = selw2s.select(setup.config, prep, known.learn, known.transfer), known.transfer
    labels = selw2s.labels_of(method, setup, prep, known, s)
    right, truth = own_right(setup.config, prep.transfer), hidden_truth(prep.transfer)
    metrics = {"seed": prep.seed, "auroc": auroc(p, right), "ece": ece(p, right),
               "tau": float(s.tau.double().mean()), "coverage": float(s.is_self.double().mean()),
               "label_accuracy": accuracy(labels, truth),
               "homophily": selw2s.homophily(prep.transfer, s.chosen_alone, setup.config.device)}
    if set(setup.config.methods) > set(selw2s.ALWAYS):
        out = selw2s.student(method, kept_nowhere(setup), prep, known, s)
        metrics["accuracy"] = accuracy(out.test, hidden_truth(prep.test))
    return metrics


def kept_nowhere(setup):
    """The setup with no student saved: --keep is of the run's own methods."""
    return setup._replace(config=replace(setup.config, keep=""))


def cross_task(setup, tasks: dict) -> dict:
    """P(IK) from one task's D_l used on each one (paper, abstract): {"A -> B": [metrics per seed]}.

    Only the probe comes from A; tau and smoothing are chosen on B's D_l. AUROC and ECE are of B's test
    questions: what A's D_l asks for, B's D_u may ask for too, as the demo's tasks do."""
    import selw2s
    config, out = setup.config, {}
    for seed in config.seeds:
        prepared, known = {}, {}
        for name, task in tasks.items():
            mine = setup if task is setup.task else kept_nowhere(setup)
            prepared[name] = selw2s.prepare(mine._replace(task=task), seed)
            known[name] = selw2s.know(config, prepared[name], config.route)
        for a, b in product(tasks, tasks):
            used, parts = known[b], prepared[b]
            if a != b:      # D_l of b took no part in this probe: nothing is held out
                used = known[a]._replace(**{name: known[a].predict(getattr(parts, name))
                                            for name in ("learn", "transfer", "test")})
            right = own_right(config, parts.test)
            metrics = student_metrics(setup, parts, used) | {
                "auroc": auroc(used.test, right), "ece": ece(used.test, right)}
            out.setdefault(f"{Path(a).name} -> {Path(b).name}", []).append(metrics)
    return out


def difficulty(setup, tasks: dict) -> dict:
    """P(IK) trained on the easy or hard half of D_l, measured on both halves of D_u (paper, abstract).

    Tau and smoothing are chosen on all of D_l. Difficulty: cross-entropy of the weak supervisor (on D_l
    cross-fitted) or -log p_strong(gold)."""
    import selw2s
    config, out = setup.config, {}
    for seed in config.seeds:
        prep = selw2s.prepare(setup, seed)
        easy = [easier_half(config, part) for part in (prep.learn, prep.transfer)]
        right = own_right(config, prep.transfer)
        for name, rows in (("all", None), ("easy", easy[0]), ("hard", ~easy[0])):
            known = known_from(config, prep, rows)
            metrics = student_metrics(setup, prep, known)
            for half, at in (("easy", easy[1]), ("hard", ~easy[1])):
                metrics[f"auroc_on_{half}"] = auroc(known.transfer[at], right[at])
                metrics[f"ece_on_{half}"] = ece(known.transfer[at], right[at])
            out.setdefault(f"trained on {name}", []).append(metrics)
    return out


def known_from(config, prep, rows):
    """P(IK) from a probe trained on some rows (n_l,) bool of D_l, None: on all of it."""
    import selw2s
    if rows is None:
        return selw2s.know(config, prep, config.route)
    known = selw2s.know(config, prep._replace(learn=selw2s.take(prep.learn, rows)), config.route)
    p_learn = known.predict(prep.learn)
    p_learn[rows] = known.learn         # there out of fold
    return known._replace(learn=p_learn)


def easier_half(config, part):
    """(n,) bool; by rank, as p may be 1 for most."""
    import selw2s
    truth = hidden_truth(part)
    if config.difficulty == "weak":
        p_gold = torch.where(truth > 0.5, part.weak, 1 - part.weak)
    else:
        p_gold = part.belief.gather(1, right_option(config, part.items, part.questions)[:, None])[:, 0]
    return p_gold.argsort(stable=True).argsort() >= (len(p_gold) + 1) // 2


def sweep(setup, tasks: dict) -> dict:
    """Labels and student as tau, alpha, k vary one at a time; measured on D_u and test: choose nothing by it.

    The graph's layer is chosen on D_l, so a fixed alpha is not a blind one; alpha is varied once more with
    the graph of the middle layer's states alone."""
    import selw2s
    config, out, alphas = setup.config, {}, (0.0, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)
    for seed in config.seeds:
        prep = selw2s.prepare(setup, seed)
        known = selw2s.know(config, prep, config.route)
        middle = prep._replace(**{name: part._replace(item_state=part.item_state[:, :1])
                                  for name, part in (("learn", prep.learn), ("transfer", prep.transfer))})
        for name, flag, values, where in (
                ("route-only", "tau", (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01), prep),
                ("graph-only", "alpha", alphas, prep), ("graph-only", "k", (5, 10, 20, 50), prep),
                ("graph-only, middle layer", "alpha", (*alphas, "auto"), middle)):
            fixed = {"tau": {"alpha": 0.0}, "k": {"alpha": 0.7}, "alpha": {"k": 10}}[flag]
            for value in values:
                varied = setup._replace(config=replace(config, **fixed, **{flag: value}))
                metrics = student_metrics(varied, where, known, name.split(",")[0])
                title = value if value == "auto" else f"{value:g}"
                out.setdefault(f"{flag} {title} ({name})", []).append(metrics)
    return out


def analysis_table(name: str, rows: dict[str, list[dict]]) -> str:
    """The means over seeds of every row of an analysis."""
    columns = [c for c in next(iter(rows.values()))[0] if c != "seed"]
    lines = [f"{name:40}" + "".join(f"{c:>16}" for c in columns)]
    for title, metrics in rows.items():
        cells = [format(mean_of(metrics, c), ".3f").replace("nan", "-") for c in columns]
        lines.append(f"{title:40}" + "".join(f"{c:>16}" for c in cells))
    return "\n".join(lines)


def representation(setup, tasks: dict) -> dict:
    """Per supervisor ||P_s (I - P_w)|| on D_u (arXiv 2502.00620): what the strong model represents and the
    weak one does not; the error that this predicts of a student of the weak labels against the ceiling; and
    that error, mean (naive - ceiling)^2 on D_u, of two students that are trained for it."""
    import selw2s
    out = {}
    for seed in setup.config.seeds:
        prep = selw2s.prepare(setup, seed)
        truth, strong = hidden_truth(prep.transfer), prep.transfer.item_state[:, -1]
        ceiling = selw2s.student("ceiling", kept_nowhere(setup), prep, None, None).transfer
        texts = [item.text for item in prep.transfer.items]
        for i, supervisor in enumerate(setup.supervisors):
            sequences = supervisor.model.tokenizer.encode(texts)
            weak = selw2s.end_states(setup.titles[i], setup, supervisor.model, sequences)
            norm, error = lacking(strong, weak, truth)
            labels = prep.supervised.every[i]
            its = prep._replace(transfer=prep.transfer._replace(weak=labels))
            naive = selw2s.student("naive", kept_nowhere(setup), its, None, None)
            out.setdefault(setup.titles[i], []).append({
                "seed": seed, "norm": norm, "predicted_error": error,
                "error": float(((naive.transfer - ceiling).double() ** 2).mean()),
                "label_accuracy": accuracy(labels, truth),
                "accuracy": accuracy(naive.test, hidden_truth(prep.test))})
    return out


def projection(states, ridge: float):
    """(U, g) of P = U diag(g) U^T = K (K + r I)^-1, K = X X^T / n, r = ridge * tr(K) / n, X (n, C) centred
    states: a thin SVD, no matrix n x n."""
    x = states.double()
    U, S, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    value = S ** 2 / len(x)
    return U, value / (value + ridge * value.sum() / len(x))


def lacking(strong, weak, y, ridge: float = 0.1) -> tuple[float, float]:
    """||P_s (I - P_w)|| and ||P_s (I - P_w) y||^2 / n of states (n, C_s), (n, C_w) and labels y (n,), all
    centred (arXiv 2502.00620; the ridge as in its code)."""
    (U, g), (V, h), y = projection(strong, ridge), projection(weak, ridge), y.double() - y.double().mean()
    C = U.T @ V
    inner = torch.eye(len(g), dtype=g.dtype) - C @ torch.diag(2 * h - h ** 2) @ C.T
    norm = torch.linalg.eigvalsh(g[:, None] * inner * g).clamp_min(0).max().sqrt()
    left = g * (U.T @ y - C @ (h * (V.T @ y)))
    return float(norm), float((left ** 2).sum() / len(y))


ANALYSES = {"cross-task": cross_task, "difficulty": difficulty, "sweep": sweep,
            "representation": representation}


def others(setup, names: list[str]) -> dict:
    """The tasks of these names, as all models can read them; one whose files cannot be had is left out, and
    that is said. DataError if all are."""
    import selw2s
    config, out, tell = setup.config, {}, setup.stages.tell
    models = *(supervisor.model for supervisor in setup.supervisors), setup.strong
    for name in names:
        try:
            task = selw2s.loaded(name, config)
        except DataError as error:
            tell(f"data      {name} is left out: {error}")
        else:
            out[name], _ = selw2s.fitted(task, models, config, tell)
    if not out:
        raise DataError(f"--analysis cross-task: the files of none of {', '.join(names)} can be had")
    return out


def analyse(setup) -> dict:
    """One analysis over all seeds: a printed table of means, the values per seed as the result."""
    import selw2s
    config, mine = setup.config, setup.config.task
    tasks = {mine: setup.task}
    if config.analysis == "cross-task":
        every = DEMO[1:] if mine in DEMO else OFFICIAL
        tasks |= others(setup, [name for name in every if name != mine])
    out = ANALYSES[config.analysis](setup, tasks)
    print(f"\n{analysis_table(config.analysis, out)}")
    return out
