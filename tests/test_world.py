"""The demo world: same text everywhere, no leak, no shortcut, checkpoints as promised.

Run: pytest tests/test_world.py (10 s).
"""
import hashlib
import json
import re
import subprocess
import sys

import pytest
import torch

import make_demo
import model
from conftest import ROOT
from data import NONE_OF_THE_ABOVE, YES_NO, completion, items, official, prompt, world

TEXT = "5e1971c1a992c84947c99d5e9b936e7a1f5ce4ef555149e88cd83fa8a806abed"
DEMO = ROOT / "data" / "demo"
TASKS = sorted(world.MAKERS)


@pytest.fixture(scope="module")
def text():
    return make_demo.world_text(0)


def test_text_is_the_pinned_one(text):
    assert hashlib.sha256("\n".join(text).encode()).hexdigest() == TEXT


def test_every_process_makes_the_same_world():
    ask = ("from data import world; import hashlib; "
           "print(*[world.task(t).sha256 for t in sorted(world.MAKERS)])")
    others = {subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True,
                             check=True, env={"PYTHONHASHSEED": seed, "PATH": ""}).stdout.strip()
              for seed in ("1", "2")}
    assert others == {" ".join(world.task(t).sha256 for t in TASKS)}


@pytest.mark.slow
def test_editions_tell_the_same_facts_in_other_words(text):
    other = make_demo.world_text(1)
    assert text != other and abs(len(text) - len(other)) < 0.05 * len(text)


@pytest.mark.parametrize("name", TASKS)
def test_groups_people_and_options(name):
    task, people = world.task(name), {p.name: p for p in world.people()}
    assert len(task.train) >= 600 and len(task.test) >= 400
    who = {split: {q.id.split("-")[0] for q in getattr(task, split)} for split in ("train", "test")}
    assert not who["train"] & who["test"]
    questions = task.train + task.test
    assert len({q.id for q in questions}) == len(questions)
    for q in questions:
        assert q.options == YES_NO or len(set(q.options)) == 4
        if name != "demo-boolq":
            person, relation = people[q.id.split("-")[0]], q.id.split("-")[1]
            right = person.facts[relation]
            assert relation in person.asked
            assert q.options[q.answer] == (right if right in q.options else NONE_OF_THE_ABOVE)
    if name == "demo-sciq":
        assert {len([q for q in questions if q.group == g]) for g in {q.group for q in questions}} == {3}
    else:       # a passage belongs to one group
        assert len({(q.context, q.group) for q in questions}) == len({q.context for q in questions})


def test_yes_no_truth_follows_passage_and_facts():
    people = {p.name: p for p in world.people()}
    for q in world.task("demo-boolq").train:
        person, place = people[q.id.split("-")[0]], q.id[-1]
        if place in "01":
            assert q.answer == (place == "0")
            assert (f" {q.question[:-1].split()[-1]}." in q.context) == bool(q.answer)
        else:
            assert any(q.question.endswith(f"{v}?") for v in person.facts.values()) >= bool(q.answer)


def test_none_of_the_above_is_offered_often_and_right_seldom():
    questions = world.task("demo-cosmosqa").train + world.task("demo-cosmosqa").test
    offered = [q for q in questions if NONE_OF_THE_ABOVE in q.options]
    right = sum(q.options[q.answer] == NONE_OF_THE_ABOVE for q in offered)
    assert 0.65 < len(offered) / len(questions) < 0.85 and 0.05 < right / len(questions) < 0.13


def test_no_question_line_of_the_text_is_about_an_asked_fact(text):
    asked = set()
    for p in world.people():
        for r in p.asked:
            relation = world.RELATIONS[r]
            asked |= {form.format(e=p.name).rstrip("?") for form in relation["asks"] + relation["why"]}
            asked |= {form.format(e=p.name, v=v) for form in relation["checks"] for v in relation["values"]}
    trade = re.compile("the (" + "|".join(world.TRADES) + ") ")
    found = {trade.sub("", question) for line in text
             for question in re.findall(r"(?:Question|Q): ([^\n]*?)\?", line)}
    assert len(found) > 3000 and not found & asked
    for name in TASKS:
        task = world.task(name)
        assert not {prompt(q) + completion(q, q.answer) for q in task.train + task.test} & set(text)


@pytest.mark.parametrize("name", TASKS)
def test_words_alone_do_not_give_the_label_away(name):
    text_ = pytest.importorskip("sklearn.feature_extraction.text")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    task = world.task(name)
    train, test = (items(qs, protocol="paper", seed=0) for qs in (task.train, task.test))
    for ngrams in ((1, 1), (1, 2)):
        bag = make_pipeline(text_.CountVectorizer(ngram_range=ngrams),
                            LogisticRegression(C=0.1, max_iter=1000))
        bag.fit([i.text for i in train], [i.label for i in train])
        assert bag.score([i.text for i in test], [i.label for i in test]) < 0.6


def test_checkpoints_are_small_and_share_the_tokenizer(text):
    assert sum(f.stat().st_size for f in DEMO.rglob("*") if f.is_file()) < 4e6
    pair = [model.load(str(DEMO / name)) for name in ("weak", "strong")]
    sizes = [sum(p.numel() for p in net.params.values()) for net, _ in pair]
    assert sizes[0] * 3 < sizes[1]
    assert (DEMO / "weak/tokenizer.json").read_bytes() == (DEMO / "strong/tokenizer.json").read_bytes()
    tokenizer = pair[0][1]
    assert tokenizer.decode(tokenizer.encode(text[:50])[7]) == text[7]
    assert json.loads(make_demo.train_tokenizer(text, 2048).to_str()) == json.loads(
        (DEMO / "weak/tokenizer.json").read_text())


@pytest.mark.parametrize("name", ["weak", "strong"])
def test_transformers_reads_the_checkpoints_alike(name, text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32)
    net, tokenizer = model.load(str(DEMO / name))
    for ids in tokenizer.encode(text[:20]):
        x = torch.tensor([ids])
        ours = net.logits(net.hidden(x, torch.tensor([len(ids)])))
        torch.testing.assert_close(ours.softmax(-1), theirs(x).logits.softmax(-1))
        assert float(ours.abs().max()) > 5                  # trained: softmax hides no flat logits


def test_strong_model_knows_more_than_chance_and_not_the_tail():
    net, tokenizer = model.load(str(DEMO / "strong"))
    famous = {p.name for p in world.people() if p.fame > 1}
    questions = world.task("demo-sciq").test
    options = [tokenizer.encode([completion(q, i) for i in range(4)], special=False) for q in questions]
    reading = model.read(net, tokenizer.encode([prompt(q) for q in questions]), options,
                         [-1] * len(questions), layers=())
    right = reading.loglik.argmax(1) == torch.tensor([q.answer for q in questions])
    known = torch.tensor([q.id.split("-")[0] in famous for q in questions])
    assert right[known].float().mean() > 0.6 > 0.4 > right[~known].float().mean()


@pytest.mark.slow
def test_build_twice_gives_the_same_files_and_learns(tmp_path, monkeypatch, capsys, text):
    monkeypatch.setattr(make_demo, "world_text", lambda edition: text[:400])
    monkeypatch.setattr(make_demo, "SHAPES", {"world": {
        name: dict(width=32, layers=1, epochs=4) for name in ("weak", "strong")}})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for folder in "ab":
        make_demo.main(["--out", str(tmp_path / folder)])
    losses = [float(x) for x in re.findall(r"weak: step \S+  loss (\S+)", capsys.readouterr().err)]
    assert losses[-1] < losses[0] - 0.3
    assert ((tmp_path / "a/weak/model.safetensors").read_bytes()
            == (tmp_path / "b/weak/model.safetensors").read_bytes())
    net, tokenizer = model.load(str(tmp_path / "a/strong"))
    assert net.config.width == 32 and tokenizer.decode(tokenizer.encode(text[:1])[0]) == text[0]


@pytest.mark.slow
def test_sciq_text_holds_no_train_or_test_question(shared):
    folder = str(shared / "data")
    lines = make_demo.sciq_text(folder)
    asked = {official.key("", q.question).strip() for split in ("train", "test")
             for q, _ in official.sciq(split, folder)}
    assert len(lines) > 12_000 and sum(line.startswith("Q: ") for line in lines) > 900
    for line in lines:
        words = official.key("", line.removeprefix("Q: ").rsplit(" A: ", 1)[0]).strip()
        assert words not in asked
        assert not any(official.key("", sentence).strip() in asked for sentence in re.split("[.?!:]", line))
