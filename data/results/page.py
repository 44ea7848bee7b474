"""report.html: one run on one page that opens from disk: what was run, table, figures, steps, every item.

It needs nothing beside itself: figures are inline, the items one JSON block, of which a script makes the rows
that are looked at. Every text of a user is escaped, in the JSON too.
"""
import html
import json
import re
from pathlib import Path

import numpy as np

from data import DEMO, write_whole
from data.jsonl import label_rows
from data.results.metrics import mean_of
from data.results.report import remarks, shown, span

UNDRAWN = "<p>No figures: pip install matplotlib, then run the same command again.</p>"
CLASSES = ("routed and right", "routed and wrong", "repaired by smoothing", "broken by smoothing",
           "weak and right", "weak and wrong")


def write_page(folder: Path, result: dict, runs: list[dict], drawn: list[str]) -> None:
    """report.html in a run's folder; runs: selw2s.record's; drawn: names of figures that lie there."""
    items = [row for run in runs for row in item_rows(run)]
    metrics, seeds = result["metrics"], [run["seed"] for run in runs]
    figures = {name: figure_html(folder / name) for name in drawn}
    plural = "" if len(seeds) == 1 else "s"
    n = f"{metrics['test_items']:,} test items x {len(seeds)} seed{plural}"
    world = "synthetic demo world, " if result["config"]["task"] in DEMO else ""
    title = f"{result['data']['name']}: {world}{n}"
    parts = {"TITLE": html.escape(title), "COMMAND": html.escape(result["command"]),
             "CAPTION": f"accuracy: n = {n}; labels: n = {len(items):,} items of D_u, all seeds",
             "TABLE": table_html(metrics),
             "REMARKS": "".join(f"<li>{html.escape(line)}" for line in remarks(metrics)),
             "PIPELINE": figures.pop("pipeline.svg", ""), "FIGURES": "".join(figures.values()) or UNDRAWN,
             "STEPS": "".join(f"<li>{html.escape(step)}" for step in steps(result)),
             "SOURCES": options(("own", "smoothed", "weak"), [row[8] for row in items]),
             "CLASSES": options(CLASSES, [row[10] for row in items]), "N": f"{len(items):,}",
             "ITEMS": safe_json(items)}
    page = re.sub(r"@([A-Z]+)@", lambda m: parts[m[1]], PAGE)      # once: no part is looked through
    write_whole(folder / "report.html",
                lambda temporary: temporary.write_text(page, "utf-8", "backslashreplace"))


def item_rows(run: dict) -> list[list]:
    """Of every item of D_u what ITEM in the script names; here the hidden truth is shown."""
    rows = []
    weak_labels = [float(str(x)) for x in run["transfer"]["weak"]]      # decimals as label_rows gives them
    truths = run["transfer"]["truth"].tolist()
    for row, weak, truth in zip(label_rows(run), weak_labels, truths, strict=True):
        context, question = shown_question(row["text"], row["candidate"])
        rows.append([row["seed"], question, context, row["candidate"], weak, row["own"], row["p_ik"],
                     row["refined"], row["source"], int(truth), class_of(row, weak, truth)])
    return rows


def class_of(row: dict, weak: float, truth: float) -> str:
    """What became of an item's label: one of CLASSES."""
    right, before = (row["label"] > 0.5) == (truth > 0.5), (weak > 0.5) == (truth > 0.5)
    if row["source"] == "own":
        return "routed and right" if right else "routed and wrong"
    if right != before:
        return "repaired by smoothing" if right else "broken by smoothing"
    return "weak and right" if right else "weak and wrong"


def shown_question(text: str, candidate: str) -> tuple[str, str]:
    """An item's text (data.prompt, data.completion) as context and question, candidate and frame off."""
    text = re.sub(r"( A:|\nAnswer:)$", "", text.removesuffix(" " + candidate))
    context, _, question = text.rpartition("\nQuestion: ")
    return re.sub(r"^(Context|Passage): ", "", context), re.sub(r"^(Q|Question): ", "", question)


def safe_json(value) -> str:
    """JSON that no HTML parser can take for markup: no <, > or &, no line separators; ASCII alone."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def options(names, values: list[str]) -> str:
    """Choices of a filter with their counts."""
    return "".join(f'<option value="{name}">{name} ({values.count(name):,})' for name in names)


def table_html(metrics: dict) -> str:
    """The final table, each number as the terminal shows it."""
    head = ("method", "accuracy", "95 % interval", "PGR", "95 % interval", "- naive", "95 % interval",
            "- zero-shot", "labels", "truth")
    lines, none = ["<tr>" + "".join(f"<th scope=col>{x}" for x in head)], {"mean": None, "ci95": None}
    for name, r in metrics["methods"].items():
        naive, untouched = r.get("minus_naive", none), r.get("minus_zero-shot", none)
        cells = (shown(r["accuracy"], ".3f"), span(r["ci95"]), shown(r["pgr"], ".2f"), span(r["pgr_ci95"]),
                 shown(naive["mean"], "+.3f"), span(naive["ci95"]), shown(untouched["mean"], "+.3f"),
                 shown(r["label_accuracy"], ".3f"), str(r["ground_truth_labels"]))
        star = "" if r["attainable"] else " *"
        lines.append(f"<tr><th scope=row>{html.escape(name)}{star}" + "".join(f"<td>{x}" for x in cells))
    return "".join(lines)


def figure_html(file: Path) -> str:
    """A figure of this run inline, its ids made its own."""
    svg, name = re.sub(r"<metadata>.*?</metadata>", "", file.read_text("utf-8"), flags=re.S), file.stem
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg[svg.index("<svg"):])
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="figure {name}" ', 1)
    return f'<figure tabindex=0 aria-label="{name}, scrolls">{svg}</figure>'


def steps(result: dict) -> list[str]:
    """The pipeline with the counts of this run, means over seeds."""
    seeds, d = result["seeds"], [seed["diagnostics"] for seed in result["seeds"]]
    n = {name: round(np.mean([seed["n"][name] for seed in seeds])) for name in seeds[0]["n"]}
    u, view = n["transfer"], result["metrics"]["supervisor"]
    made = "cross-fitted" if view["trained"] else "as they came"

    def right(source, rows):
        value = mean_of([x["label_accuracy"][source] for x in d], rows)
        return "none" if np.isnan(value) else f"{value:.3f} right"
    routed, own = mean_of(d, "coverage"), mean_of([x["p_ik"]["transfer"] for x in d], "own_right")
    area, used = mean_of([x["p_ik"]["transfer"] for x in d], "auroc"), round(routed * u)
    alphas = ", ".join(f"{seed['smoothing']['alpha']:g}" for seed in seeds)
    return [f"split: D_l {n['labelled']:,}, D_u {u:,}, test {n['test']:,} items",
            f"weak supervisor: {view['actual']:.3f} of its labels of D_u right (n = {u:,}), on D_l, "
            f"{made}, {view['cross_fitted']:.3f} (n = {n['labelled']:,})",
            f"own answers: {own:.3f} of D_u's questions answered right (n = {u:,})",
            f"P(IK): AUROC {area:.3f} on D_u (n = {u:,})",
            f"route: own label on {routed:.3f} of D_u (n = {used:,}): {right('own', 'routed')}",
            f"smooth (alpha {alphas}): the other labels (n = {u - used:,}): weak "
            f"{right('weak', 'unrouted')}, refined {right('refined', 'unrouted')}",
            *(f"student {name}: labels {right(f'label/{name}', 'all')} (n = {u:,})"
              for name in ("selective", "fused") if f"label/{name}" in d[0]["label_accuracy"])]


PAGE = r"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>@TITLE@</title>
<style>
:root { --ink: #1b1b1b; --back: #fff; --soft: #f1f2f4; --line: #c9ccd1; --link: #0b57a4; --bad: #a83200 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --back: #1a1a1a; --soft: #24272c; --line: #454a52; --link: #8dc1ff; --bad: #ffa27a }
  figure svg { filter: invert(.9) hue-rotate(180deg) } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
  padding: 1rem; max-width: 76rem }
h1 { font-size: 1.3rem; margin: 0 0 .5rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem }
code { display: block; background: var(--soft); padding: .6rem; overflow-wrap: anywhere }
.wide, figure { overflow-x: auto; margin: 0 0 .6rem } figure svg { max-width: 100%; height: auto }
table { border-collapse: collapse; width: 100% }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  font-variant-numeric: tabular-nums }
#table td, #table tr > :first-child { white-space: nowrap }
#table th:first-child, #items .text { text-align: left }
#items td { white-space: nowrap } #items td[data-name=question], #items td[data-name=candidate] {
  overflow-wrap: anywhere; white-space: pre-line; min-width: 8rem }
#items td[data-name=question] { min-width: 13rem } #items td[data-name=became] { white-space: normal }
#items .wrong { color: var(--bad) }
button, select { font: inherit; color: var(--link); background: var(--soft); border: 1px solid var(--line);
  border-radius: .3rem; padding: .2rem .45rem } select { color: var(--ink); max-width: 100% }
th button { font-weight: 600; white-space: nowrap }
:focus-visible { outline: 3px solid var(--link); outline-offset: 1px }
.row { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .5rem 0 }
li { margin: .15rem 0 } summary { cursor: pointer; color: var(--link) }
@media (max-width: 45rem) { figure svg { max-width: none; width: 40rem } }
@media (max-width: 66rem) {
  #items, #items tbody { display: block } #items thead tr { display: flex; flex-wrap: wrap; gap: .3rem }
  #items thead th { border: 0; padding: 0 }
  #items tbody tr { display: block; padding: .5rem 0; border-bottom: 2px solid var(--line) }
  #items td { display: inline-block; border: 0; padding: 0 .9rem 0 0 }
  #items td[data-name=question], #items td[data-name=candidate] { display: block; min-width: 0 }
  #items td::before { content: attr(data-name) " "; opacity: .7 } }
@media print { .row, #items thead { display: none !important }
  h2 { break-after: avoid } tr, figure { break-inside: avoid }
  body { font-size: 11px; padding: 0 } figure svg { max-width: 100% !important; width: auto !important } }
</style>
<main>
<h1>@TITLE@</h1>
<code>@COMMAND@</code>
<h2>Table</h2>
<p>@CAPTION@</p>
<div class="wide" tabindex="0" role="region" aria-label="table, scrolls">
<table id="table">@TABLE@</table></div>
<ul>@REMARKS@</ul>
<h2>Figures</h2>
@FIGURES@
<h2>Steps, with the counts of this run</h2>
@PIPELINE@<ol>@STEPS@</ol>
<h2>Items of D_u</h2>
<p>Numbers are P(y = 1) of the candidate shown. <b>own</b>: the strong model's own label, used where the
source is own; <b>P(IK)</b>: that its own answer is right; <b>refined</b>: the label smoothed over the graph;
<b>truth</b>: hidden from all training but the ceiling's and the oracle's.</p>
<div class="row"><label>source <select id="source"><option value="">all (@N@)@SOURCES@</select></label>
<label>became <select id="class"><option value="">all (@N@)@CLASSES@</select></label>
<span id="count" role="status"></span></div>
<noscript>The items need a script, which this page brings along; they are in labels.jsonl too.</noscript>
<div class="wide"><table id="items"><thead><tr></tr></thead><tbody></tbody></table></div>
<div class="row"><button id="more">200 more</button><button id="rest">show all</button></div>
</main>
<script type="application/json" id="data">@ITEMS@</script>
<script>
"use strict"
const ITEM = ["seed", "question", "context", "candidate", "weak", "own", "P(IK)", "refined", "source",
              "truth", "became"]
const CONTEXT = 2, TEXT = [1, 3, 8, 10], SHARE = [4, 6, 7]
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent)
const state = { source: "", class: "", sort: "", down: "", ...Object.fromEntries(
  new URLSearchParams(location.hash.slice(1))) }
const seeds = new Set(data.map(x => x[0])).size
const columns = [...ITEM.keys()].filter(i => i != CONTEXT && (i || seeds > 1))
let found = [], made = 0
const make = (name, text, more) => Object.assign(document.createElement(name), { textContent: text }, more)
function cell(row, i) {
  const td = make("td", SHARE.includes(i) ? row[i].toFixed(3) : row[i])
  if (TEXT.includes(i)) td.classList.add("text")
  if (i == 10 && /wrong|broken/.test(row[i])) td.classList.add("wrong")
  if (i == 1 && row[CONTEXT]) {
    const more = document.createElement("details")
    more.append(make("summary", "context"), row[CONTEXT])
    td.append(more)
  }
  td.dataset.name = ITEM[i]
  return td
}
function add(n) {
  const rows = document.createDocumentFragment()
  for (const row of found.slice(made, made + n)) {
    const tr = rows.appendChild(document.createElement("tr"))
    tr.append(...columns.map(i => cell(row, i)))
  }
  document.querySelector("#items tbody").append(rows)
  made = Math.min(made + n, found.length)
  $("count").textContent = `${made.toLocaleString("en")} of ${found.length.toLocaleString("en")} shown`
  $("more").hidden = $("rest").hidden = made == found.length
}
function show() {
  found = data.filter(x => (!state.source || x[8] == state.source) && (!state.class || x[10] == state.class))
  const i = ITEM.indexOf(state.sort), sign = state.down ? -1 : 1
  if (i >= 0) found.sort((a, b) => sign * (typeof a[i] == "string" ? a[i].localeCompare(b[i]) : a[i] - b[i]))
  for (const th of document.querySelectorAll("#items th")) {
    const order = th.dataset.name != state.sort ? "none" : state.down ? "descending" : "ascending"
    const mark = { none: "", descending: " \u25bc", ascending: " \u25b2" }
    th.setAttribute("aria-sort", order)
    th.firstChild.textContent = th.dataset.name + mark[order]
  }
  document.querySelector("#items tbody").replaceChildren()
  made = 0
  add(200)
}
for (const i of columns) {
  const th = make("th", "", { scope: "col", className: TEXT.includes(i) ? "text" : "" })
  th.dataset.name = ITEM[i]
  th.append(make("button", ITEM[i], { onclick: () => {
    state.down = state.sort == ITEM[i] && !state.down ? "1" : ""
    state.sort = ITEM[i]
    show()
  } }))
  document.querySelector("#items thead tr").append(th)
}
for (const name of ["source", "class"]) {
  $(name).value = state[name]
  $(name).onchange = event => { state[name] = event.target.value; show() }
}
$("more").onclick = () => add(200)
$("rest").onclick = () => add(data.length)
show()
</script>
</html>
"""
