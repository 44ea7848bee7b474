"""report.html, parsed, and used where chromium is installed; labels.jsonl, and a finetune from it alone.

Run: pytest tests/test_page.py (40 s; with CI=1 transformers' finetune too, 10 s more).
"""
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import selw2s
from conftest import ROOT
from data.results.page import CLASSES, class_of, shown_question, write_page
from data.results.report import shown, span
from data.results.store import read_run


def go(tiny, out, *more):
    return selw2s.run(selw2s.parse([*tiny, "--out", str(out), *more]))


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """A run of two seeds with smoothing on: result and folder."""
    out = tmp_path_factory.mktemp("ran")
    result = go(tiny, out, "--methods", "naive", "selective", "--seeds", "0", "1", "--alpha", "0.5",
                "--k", "5", "--tau", "0.4")
    return result, next(out.glob("*/*/result.json")).parent


def lines(folder):
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text("utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------- labels out
def test_labels_are_what_selective_was_trained_on(ran, tiny):
    result, folder = ran
    rows, task = lines(folder), selw2s.load_task(tiny[1])
    question = {q.id: q for q in task.train}
    with np.load(folder / "items.npz") as data:
        for seed in (0, 1):
            mine = [row for row in rows if row["seed"] == seed]
            u = {name: data[f"seed{seed}/transfer/{name}"] for name in
                 ("id", "group", "weak", "own", "p_ik", "refined", "is_self", "label/selective")}
            for name in ("id", "group"):
                assert [row[name] for row in mine] == u[name].tolist()
            for name, of in (("label", "label/selective"), ("own", "own"), ("p_ik", "p_ik"),
                             ("refined", "refined")):
                np.testing.assert_array_equal(np.array([row[name] for row in mine], np.float32), u[of])
            weak = np.array([row["weak"]["weak"] for row in mine], np.float32)
            np.testing.assert_array_equal(weak, u["weak"])
            assert [row["source"] for row in mine] == ["own" if own else "smoothed" for own in u["is_self"]]
            for row in mine:
                q = question[row["question_id"]]
                assert row["id"].startswith(q.id + "/")
                assert row["text"] == f"{selw2s.prompt(q)} {row['candidate']}"
                assert row["candidate"] == q.options[int(row["id"].rsplit("/", 1)[1])]
    assert {row["source"] for row in rows} == {"own", "smoothed"} and len({tuple(row) for row in rows}) == 1


def test_labels_need_no_student_and_say_weak_without_smoothing(tiny, tmp_path):
    go(tiny, tmp_path, "--methods", "weak", "--tau", "1.01", "--alpha", "0")
    rows = lines(next(tmp_path.glob("*/*/result.json")).parent)
    assert {row["source"] for row in rows} == {"weak"}
    assert all(row["label"] == row["refined"] == row["weak"]["weak"] for row in rows)


@pytest.mark.slow
def test_a_merge_has_the_labels_of_its_runs(tiny, ran, tmp_path):
    flags = ("--methods", "naive", "selective", "--alpha", "0.5", "--k", "5", "--tau", "0.4")
    for seed in ("1", "0"):
        go(tiny, tmp_path / seed, *flags, "--seeds", seed)
    files = [str(next((tmp_path / seed).glob("*/*/result.json"))) for seed in ("1", "0")]
    assert selw2s.main(["--merge", *files, "--out", str(tmp_path / "both")]) == 0
    merged = next((tmp_path / "both").glob("*/*/labels.jsonl"))
    assert merged.read_bytes() == (ran[1] / "labels.jsonl").read_bytes()


def test_datasets_reads_the_labels(ran, tmp_path):
    datasets = pytest.importorskip("datasets", reason="only with the package datasets")
    read = datasets.load_dataset("json", data_files=str(ran[1] / "labels.jsonl"), split="train",
                                 cache_dir=str(tmp_path))
    assert list(read) == lines(ran[1])


@pytest.mark.slow
def test_transformers_finetunes_from_the_labels_alone(ran, tiny, tmp_path, monkeypatch):
    """The example of data/README.md, as it stands there, on the tiny task."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    readme = (ROOT / "data/README.md").read_text("utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    assert len(example.splitlines()) <= 10
    strong = tmp_path / "strong"
    strong.mkdir()
    for file in Path(tiny[5]).iterdir():
        (strong / file.name).write_bytes(file.read_bytes())
    (strong / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "labels.jsonl").write_bytes((ran[1] / "labels.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    used, real = [], transformers.Trainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        used.extend(inputs["labels"][:, 0].tolist())
        return real(self, model, inputs, *args, **kwargs)
    monkeypatch.setattr(transformers.Trainer, "compute_loss", spy)
    exec(example.replace("STRONG", repr(str(strong))), {})
    with np.load(ran[1] / "items.npz") as data:     # each label once in each of two epochs
        trained_on = np.concatenate([data["seed0/transfer/label/selective"]] * 2)
    np.testing.assert_array_equal(np.sort(np.array(used, np.float32)), np.sort(trained_on))
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert torch.isfinite(student.score.weight).all() and student.score.weight.shape == (1, 32)


# ------------------------------------------------------------------------------------------------------- page
class Parsed(HTMLParser):
    """Tags met, the text of table cells by row, the JSON block."""
    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.block, self.inside, self.links = [], [], "", "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = "json" if ("type", "application/json") in attributes else tag
        self.links += [value for name, value in attributes
                       if name in ("src", "href", "xlink:href", "action") and not value.startswith("#")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data
        if self.inside == "json":
            self.block += data


def parsed(folder):
    return Parsed((folder / "report.html").read_text("utf-8"))


def test_every_number_of_the_pages_table_is_the_results(ran):
    result, folder = ran
    page, none = parsed(folder), {"mean": None, "ci95": None}
    rows = {row[0]: row[1:] for row in page.rows[1:] if row}
    assert list(rows) == list(result["metrics"]["methods"])
    for name, r in result["metrics"]["methods"].items():
        naive, untouched = r.get("minus_naive", none), r.get("minus_zero-shot", none)
        assert rows[name] == [
            shown(r["accuracy"], ".3f"), span(r["ci95"]), shown(r["pgr"], ".2f"), span(r["pgr_ci95"]),
            shown(naive["mean"], "+.3f"), span(naive["ci95"]), shown(untouched["mean"], "+.3f"),
            shown(r["label_accuracy"], ".3f"), str(r["ground_truth_labels"])]


def test_the_page_has_all_items_and_needs_nothing_else(ran, tiny):
    result, folder = ran
    page, task = parsed(folder), selw2s.load_task(tiny[1])
    items, rows = json.loads(page.block), lines(folder)
    asked, counted = {q.question for q in task.train}, {name: 0 for name in CLASSES}
    with np.load(folder / "items.npz") as data:
        truth = np.concatenate([data[f"seed{seed}/transfer/truth"] for seed in (0, 1)])
    assert len(items) == len(rows) == len(truth)
    for item, row, y in zip(items, rows, truth):
        seed, question, context, candidate, weak, own, p_ik, refined, source, shown_truth, became = item
        assert question in asked and not context and shown_truth == y
        assert [seed, candidate, own, p_ik, refined, source] == [
            row[key] for key in ("seed", "candidate", "own", "p_ik", "refined", "source")]
        assert weak == row["weak"]["weak"]
        counted[became] += 1
        right = (row["label"] > 0.5) == (y > 0.5)
        assert right == (became in ("routed and right", "repaired by smoothing", "weak and right"))
    text = (folder / "report.html").read_text("utf-8")
    assert all(f'<option value="{name}">{name} ({n:,})' in text for name, n in counted.items())
    svgs = len(list(folder.glob("*.svg")))
    assert page.tags.count("svg") == svgs > 0 and not page.links and "url(http" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_classes_and_questions_of_items():
    def became(source, label, weak, truth):
        return class_of({"source": source, "label": label}, weak, truth)
    assert became("own", 1.0, 0.2, 1.0) == "routed and right"
    assert became("own", 1.0, 0.2, 0.0) == "routed and wrong"
    assert became("smoothed", 0.6, 0.4, 1.0) == "repaired by smoothing"
    assert became("smoothed", 0.6, 0.4, 0.0) == "broken by smoothing"
    assert became("weak", 0.6, 0.6, 1.0) == became("smoothed", 0.9, 0.6, 1.0) == "weak and right"
    assert became("smoothed", 0.9, 0.6, 0.0) == "weak and wrong"
    for q, option in ((("", "Who?", ("a", "b"), 0), 1), (("In a\nwood", "Who?", ("a", "b"), 0), 0),
                      (("A passage.", "is it", ("no", "yes"), 0), 1), (("", "is it", ("no", "yes"), 0), 1)):
        q = selw2s.Question("q", "g", *q)
        text = selw2s.prompt(q) + ("" if q.options == ("no", "yes") else selw2s.completion(q, option))
        assert shown_question(text, q.options[option]) == (q.context, q.question)


HOSTILE = ["</script><script>document.title='owned'</script>", "<!-- <script>", "@ITEMS@ </table></style>",
           "<img src=x onerror=\"document.title='owned'\">", "&lt;b&gt; \u2028 \u202e ]]> \\u003c"]


@pytest.fixture(scope="module")
def hostile(tiny, tmp_path_factory):
    """A run whose every question, context and option carries markup; its folder."""
    out = tmp_path_factory.mktemp("hostile")
    rows = [json.loads(line) for line in Path(tiny[1]).read_text().splitlines()]
    for i, row in enumerate(rows):
        row["question"] = HOSTILE[i % 5] + row["question"]
        row["options"] = [f"{option} {HOSTILE[(i + 1) % 5]}" for option in row["options"]]
        row["context"] = HOSTILE[(i + 2) % 5] if i % 2 else ""
    (out / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [f"{out / 'task.jsonl'}" if arg == tiny[1] else arg for arg in tiny]
    go(argv, out, "--methods", "selective", "--epochs", "1")
    return next(out.glob("*/*/result.json")).parent


def test_hostile_text_stays_text(hostile, ran):
    page, plain = parsed(hostile), parsed(ran[1])
    assert page.tags.count("script") == plain.tags.count("script") == 2 and "img" not in page.tags
    assert page.tags.count("style") == plain.tags.count("style")
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>',
                      (hostile / "report.html").read_text("utf-8"), re.S)[1]
    assert not set("<>&") & set(block) and block.isascii()
    items, rows = json.loads(block), lines(hostile)
    assert [item[3] for item in items] == [row["candidate"] for row in rows]
    assert all(item[1] in row["text"] and item[2] in row["text"] for item, row in zip(items, rows))
    assert all(any(text in item[1] for item in items) for text in HOSTILE)


def test_ten_thousand_items_are_quick_and_small(ran, tmp_path):
    result, runs = read_run(str(ran[1] / "result.json"))
    n, run = 10_000, dict(runs[0])
    at = np.arange(n) % len(run["transfer"]["id"])
    run["transfer"] = {key: x[at] for key, x in run["transfer"].items()}
    run["texts"] = {key: [x[i] for i in at] for key, x in run["texts"].items()}
    start = time.process_time()
    write_page(tmp_path, result, [run], [])
    seconds, size = time.process_time() - start, (tmp_path / "report.html").stat().st_size
    assert len(json.loads(parsed(tmp_path).block)) == n
    assert seconds < 5 and size < 2_500_000
    assert len(parsed(tmp_path).rows) < 20              # rows are made on demand
    print(f"10,000 items: {seconds:.2f} s, {size / 1e6:.2f} MB")


# ----------------------------------------------------------------------------------------------- in a browser
def in_browser(folder, script, fragment=""):
    """The page after `script` ran in it, whose value lands in the title."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("no chromium: apt-get install chromium")
    text = (folder / "report.html").read_text("utf-8")
    page = folder / "driven.html"
    page.write_text(text.replace("</html>", f"<script>document.title = JSON.stringify((() => {{{script}}})())"
                                            "</script></html>"), "utf-8")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"--user-data-dir={folder / 'profile'}", f"file://{page}{fragment}"],
                          capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr[-500:]
    import html
    return json.loads(html.unescape(title[1]))


READ = """
const cells = name => document.querySelectorAll(`#items td[data-name="${name}"]`)
const column = name => [...cells(name)].map(x => x.textContent)
const press = name => [...document.querySelectorAll("#items th")].find(x => x.dataset.name == name).firstChild
const choose = (id, value) => {
  document.getElementById(id).value = value
  document.getElementById(id).dispatchEvent(new Event("change")) }
"""


@pytest.mark.slow
def test_the_browser_sorts_and_filters(ran):
    rows = [row for row in json.loads(parsed(ran[1]).block)]
    got = in_browser(ran[1], READ + """
        const out = { all: column("P(IK)").length }
        press("P(IK)").click(); out.up = column("P(IK)").map(Number)
        out.order = press("P(IK)").parentNode.ariaSort
        press("P(IK)").click(); out.down = column("P(IK)").map(Number)
        out.focusable = press("P(IK)").tabIndex
        choose("source", "own"); out.source = column("source")
        choose("class", "routed and wrong"); out.both = column("became")
        out.count = document.getElementById("count").textContent
        return out""")
    p = sorted(round(row[6], 3) for row in rows)
    assert got["all"] == len(rows) and got["order"] == "ascending" and got["focusable"] == 0
    assert got["up"] == pytest.approx(p, abs=6e-4) and got["down"] == pytest.approx(p[::-1], abs=6e-4)
    own = [row for row in rows if row[8] == "own"]
    wrong = [row for row in own if row[10] == "routed and wrong"]
    assert got["source"] == ["own"] * len(own) and got["both"] == ["routed and wrong"] * len(wrong)
    assert got["count"] == f"{len(wrong)} of {len(wrong)} shown"
    asked = in_browser(ran[1], READ + 'return [column("source"), column("refined").map(Number)]',
                       "#source=smoothed&sort=refined&down=1")
    assert set(asked[0]) == {"smoothed"} and asked[1] == sorted(asked[1], reverse=True)


def test_the_browser_shows_hostile_text_as_it_is(hostile):
    items = json.loads(parsed(hostile).block)
    got = in_browser(hostile, READ + """
        const strange = document.querySelectorAll("img, #items script").length
        return [column("candidate"), strange, document.title]""")
    assert got[0] == [item[3] for item in items] and got[1] == 0 and got[2].startswith("task: ")


@pytest.mark.slow
def test_the_browser_makes_two_hundred_rows_and_the_rest_on_demand(ran, tmp_path):
    result, runs = read_run(str(ran[1] / "result.json"))
    run, at = dict(runs[0]), np.arange(10_000) % len(runs[0]["transfer"]["id"])
    run["transfer"] = {key: x[at] for key, x in run["transfer"].items()}
    run["texts"] = {key: [x[i] for i in at] for key, x in run["texts"].items()}
    write_page(tmp_path, result, [run], [])
    first, more, every, seconds = in_browser(tmp_path, READ + """
        const out = [column("own").length]
        document.getElementById("more").click(); out.push(column("own").length)
        const start = performance.now()
        press("question").click()
        document.getElementById("rest").click(); out.push(column("own").length)
        return [...out, (performance.now() - start) / 1000]""")
    assert (first, more, every) == (200, 400, 10_000) and seconds < 10
