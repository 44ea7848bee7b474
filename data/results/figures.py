"""Figures of a run, drawn from what result.json holds, as SVG; matplotlib is needed, and only here."""
from pathlib import Path

import numpy as np

from data import DEMO, write_whole
from data.results.metrics import mean_of

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"        # distinct to colour-blind readers and in print


def figures(folder: Path, result: dict) -> list[str]:
    """Draw a result as SVG in its run's folder; returns the names. ImportError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    matplotlib.rcParams |= {"svg.hashsalt": "selw2s", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False, "legend.frameon": False, "svg.fonttype": "none",
                            "text.parse_math": False}       # a path may hold $
    n, seeds = result["metrics"]["test_items"], result["config"]["seeds"]
    world = "synthetic demo world, " if result["config"]["task"] in DEMO else ""
    caption = (f"{result['data']['name']}: {world}{n:,} test items, seeds {' '.join(map(str, seeds))}\n"
               f"{result['command']}").encode("utf-8", "backslashreplace").decode()
    drawn = {"main.svg": draw_main, "p_ik.svg": draw_p_ik, "labels.svg": draw_labels}
    if "selective" in result["metrics"]["methods"]:
        drawn["pipeline.svg"] = draw_pipeline
    if result["analysis"]:
        of_analysis = {"cross-task": draw_cross_task, "difficulty": draw_difficulty, "sweep": draw_sweep,
                       "representation": draw_representation}
        drawn["analysis.svg"] = of_analysis[result["config"]["analysis"]]
    for name, draw in drawn.items():
        figure = draw(plt, result)
        figure.text(0.01, 1.01, caption, fontsize=7, color=GREY, ha="left", va="bottom")
        write_whole(folder / name, lambda temporary: figure.savefig(
            temporary, format="svg", metadata={"Date": None}, bbox_inches="tight"))
        plt.close(figure)
    return list(drawn)


def draw_pipeline(plt, result):
    """The method's steps with the counts of this run on its arrows, means over seeds."""
    seeds, methods = result["seeds"], result["metrics"]["methods"]
    d = [seed["diagnostics"] for seed in seeds]
    n = {name: round(np.mean([seed["n"][name] for seed in seeds])) for name in seeds[0]["n"]}

    def part(source, rows):
        share = mean_of([x["label_accuracy"][source] for x in d], rows)
        return "none" if np.isnan(share) else f"{share:.0%}"
    routed = mean_of(d, "coverage")
    own = mean_of([x["p_ik"]["transfer"] for x in d], "own_right")
    auc = mean_of([x["p_ik"]["transfer"] for x in d], "auroc")
    boxes = {   # name: (x, y, text)
        "data": (0, 1, f"1 questions\nD_l {n['labelled']:,}   D_u {n['transfer']:,}"),
        "weak": (1.5, 2, f"2 weak supervisor\nlabels of D_u: {part('weak', 'all')} right"),
        "own": (1.5, 0, f"3 strong model's own answers\n{own:.0%} of D_u's questions right"),
        "know": (3.6, 0, f"4 P(IK), linear probe\nAUROC {auc:.2f} on D_u"),
        "route": (3.6, 1, f"5 route: P(IK) >= tau?\nyes: {routed:.0%} of D_u"),
        "smooth": (3.6, 2, f"6 smooth on the kNN graph\nthe others: {part('weak', 'unrouted')} -> "
                           f"{part('refined', 'unrouted')} right"),
        "student": (5.4, 1, f"7 student\nlabels: {part('label/selective', 'all')} right\n"
                            f"test accuracy {methods['selective']['accuracy']:.3f}")}
    given = "" if result["metrics"]["supervisor"].get("trained", True) else "labels came with it"
    arrows = (("data", "weak", given or "D_l with truth"), ("data", "own", ""),
              ("own", "know", "hidden states"),
              ("know", "route", ""), ("weak", "smooth", "soft labels"), ("route", "smooth", ""),
              ("route", "student", f"own labels:\n{part('own', 'routed')} right"),
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
        if name in methods and methods[name]["accuracy"] is not None:
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
    measures = {"auroc": "AUROC of P(IK) on test", "accuracy": "accuracy of the selective student"}
    if "accuracy" not in next(iter(rows.values()))[0]:      # --methods weak
        measures = {"auroc": measures["auroc"], "label_accuracy": "labels of D_u right, selective"}
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


def draw_representation(plt, result):
    """A student's error against the ceiling, as predicted from representations and as measured, per weak
    model; a small mark per seed."""
    rows = result["analysis"]
    figure, ax = plt.subplots(figsize=(5, 3))
    for metrics, colour in zip(rows.values(), (BLUE, ORANGE, GREY, "black") * len(rows)):
        ax.plot(*([m[key] for m in metrics] for key in ("predicted_error", "error")), "o", color=colour,
                alpha=0.3, markersize=4)
    for (name, metrics), colour in zip(rows.items(), (BLUE, ORANGE, GREY, "black") * len(rows)):
        ax.plot(mean_of(metrics, "predicted_error"), mean_of(metrics, "error"), "o", color=colour,
                markersize=8, label=name)
    ax.set_xlabel("predicted: |P_s (I - P_w) y|^2 / n on D_u")
    ax.set_ylabel("measured: mean (naive - ceiling)^2 on D_u")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="weak model")
    return figure


def draw_sweep(plt, result):
    """Labels, student and the graph's homophily as tau, alpha and k vary; a small mark per seed."""
    rows = result["analysis"]
    off = rows["alpha 0 (graph-only)"]
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True)
    panels = {"tau": "(route-only)", "alpha": "(graph-only)", "k": "(graph-only)",
              "alpha ": "(graph-only, middle layer)"}
    for ax, (flag, how) in zip(axes, panels.items()):
        chosen = {title.split()[1]: row for title, row in rows.items()
                  if title.split()[0] == flag.strip() and title.endswith(how)}
        keys = [("label_accuracy", ORANGE, "^", "labels right")]
        if "accuracy" in off[0]:
            keys.append(("accuracy", BLUE, "o", "student right"))
        if flag == "k":
            keys.append(("homophily", "black", "s", "homophily"))
        for key, colour, mark, label in keys:
            for i, metrics in enumerate(chosen.values()):
                ax.plot([i] * len(metrics), [m[key] for m in metrics], mark, color=colour, alpha=0.3,
                        markersize=3)
            ax.plot([mean_of(metrics, key) for metrics in chosen.values()], mark + "-", color=colour,
                    label=label)
        if flag != "tau":
            ax.axhline(mean_of(off, "label_accuracy"), color=GREY, linestyle=":", linewidth=1,
                       label="labels, no smoothing")
        ax.set_xticks(range(len(chosen)), list(chosen), fontsize=7)
        ax.set_xlabel({"tau": "tau (route-only)", "alpha": "alpha (graph-only, k 10)",
                       "k": "k (graph-only, alpha 0.7)",
                       "alpha ": "alpha (graph-only, k 10, middle layer)"}[flag])
    axes[0].set_ylabel("share (axis does not start at 0)")
    handles = axes[2].get_legend_handles_labels()       # the panel that has all of them
    axes[3].legend(*handles, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
