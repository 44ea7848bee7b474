"""Data: readers, binary items, halves, pinned downloads, and a user's own file.

Run: python -m pytest tests/test_data.py        (about 15 s; no network)

The openai protocol is compared with digests of what the public code (openai/weak-to-strong 6b450f2) with
datasets 5.2.0 gives for the official files, read from ../shared/data; without it such tests are skipped.
"""
import csv
import hashlib
import io
import json
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (DEMO, NONE_OF_THE_ABOVE, OFFICIAL, YES_NO, DataError, Item, Question, Task, cache,
                  candidate, column_of, completion, distinct, fit, halves, items, load_task, official, plain,
                  prompt, world)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="official files are not in ../shared/data")

SCIQ = Question("s", "s", "", "What is wet?", ("fire", "water", "sand", "air"), 1)
COSMOS = Question("c", "c", "I fell .", "Why ?", ("ice", "rain", "luck", NONE_OF_THE_ABOVE), 0)
BOOLQ = Question("b", "b", "Water is wet.", "is water wet", YES_NO, 1)


def many(n, k=4, groups=None):
    rng = random.Random(n)
    return [Question(f"q{i}", f"g{i if groups is None else rng.randrange(groups)}", "", f"question {i}?",
                     tuple(f"o{j}" for j in range(k)), rng.randrange(k)) for i in range(n)]


# -- text ------------------------------------------------------------------------------------------------

def test_text_is_the_public_codes_by_structure():
    assert prompt(SCIQ) + completion(SCIQ, 2) == "Q: What is wet? A: sand"
    assert prompt(COSMOS) + completion(COSMOS, 0) == "Context: I fell .\nQuestion: Why ?\nAnswer: ice"
    assert prompt(BOOLQ) == "Passage: Water is wet.\nQuestion: is water wet"
    assert [completion(BOOLQ, i) for i in (0, 1)] == ["\nAnswer: no", "\nAnswer: yes"]
    assert prompt(BOOLQ._replace(context="")) == "Question: is water wet"


# -- items -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", ["paper", "openai"])
@pytest.mark.parametrize("seed", range(5))
def test_items_agree_with_their_questions(protocol, seed):
    questions = many(200) + [BOOLQ, BOOLQ._replace(id="b2", answer=0)]
    by_id = {q.id: q for q in questions}
    pool = items(questions, protocol=protocol, seed=seed)
    assert len({i.id for i in pool}) == len(pool)
    for item in pool:
        q = by_id[item.question_id]
        assert item.id == f"{q.id}/{item.option}"
        if q.options == YES_NO:
            assert (item.option, item.text, item.label) == (1, prompt(q), q.answer)
        else:
            assert item.text == prompt(q) + completion(q, item.option)
            assert item.label == (item.option == q.answer)


def test_items_by_hand():
    """Seed 1 draws .134 (right), .847 (wrong, then one choice): the same draws by hand from random.Random."""
    rng, expected = random.Random(1), []
    for q in (questions := many(40, k=3)):
        right = rng.random() < 0.5
        option = q.answer if right else rng.choice([i for i in range(3) if i != q.answer])
        expected.append((q.id, option, int(right)))
    assert expected[0][2] == 1 and expected[1][2] == 0
    for protocol in ("openai", "paper"):
        pool = {(i.question_id, i.option, i.label) for i in items(questions, protocol=protocol, seed=1)}
        assert pool <= set(expected) and (len(pool) == 40 or protocol == "paper")


def test_right_and_wrong_options_are_drawn_uniformly():
    pool = items([SCIQ._replace(id=str(i)) for i in range(6000)], protocol="paper", seed=0)
    shares = {option: n / 6000 for option, n in Counter(i.option for i in pool).items()}
    assert shares[1] == pytest.approx(1 / 2, abs=0.03)
    assert [shares[o] for o in (0, 2, 3)] == pytest.approx([1 / 6] * 3, abs=0.02)


@pytest.mark.parametrize("yes, no, left", [(62, 38, (46, 38)), (55, 45, (55, 45)), (56, 45, (55, 45)),
                                           (1, 5, (1, 1)), (45, 70, (45, 55))])
def test_balance_is_55_percent_at_most(yes, no, left):
    questions = [BOOLQ._replace(id=f"{a}{i}", answer=a) for a, n in ((1, yes), (0, no)) for i in range(n)]
    for seed in range(5):
        pool = items(questions, protocol="paper", seed=seed)
        assert (sum(i.label for i in pool), sum(1 - i.label for i in pool)) == left
        assert pool == sorted(pool, key=lambda i: [q.id for q in questions].index(i.question_id))
    assert len(items(questions, protocol="openai", seed=0)) == yes + no
    if yes + no > sum(left) + 5:
        kept = [{i.id for i in items(questions, protocol="paper", seed=s)} for s in (0, 1)]
        assert kept[0] != kept[1]


def test_none_of_the_above():
    none_right = [COSMOS._replace(id=str(i), answer=3) for i in range(400)]
    ordinary = items(none_right, protocol="paper", seed=0)
    assert {i.option for i in ordinary if i.label} == {3}                       # [D7]: shown, and right
    shortcut = {i.question_id: i for i in items([*none_right, COSMOS, BOOLQ], protocol="openai", seed=3)}
    rng = random.Random(3)                                  # no random() is drawn where "none" is right
    for q in none_right:
        assert shortcut[q.id][3:] == (rng.choice([0, 1, 2]), 0)
    assert shortcut["c"].option == (0 if rng.random() < 0.5 else rng.choice([1, 2, 3]))


def test_an_option_that_repeats_the_right_one():
    twice = [SCIQ._replace(id=str(i), options=("fire", "water", "water", "air")) for i in range(200)]
    wrong = {protocol: {i.option for i in items(twice, protocol=protocol, seed=0) if not i.label}
             for protocol in ("paper", "openai")}
    assert wrong == {"paper": {0, 3}, "openai": {0, 2, 3}}
    passage = [q._replace(context="text") for q in twice]
    assert {i.option for i in items(passage, protocol="openai", seed=0) if not i.label} == {0, 3}


def test_options_of_one_text_are_one_option():
    """Equal after NFC, trimming and removal of zero-width characters; case and signs still count."""
    options = ("caf\u00e9", "C", " cafe\u0301\u200b", "c", "C+", "\ufeffC\u00a0")
    assert distinct(options) == [0, 1, 3, 4]
    assert [column_of(options, i) for i in range(6)] == [0, 1, 0, 2, 3, 1]
    assert plain("\u200b \u00ad\u200d") == "" and plain("e\u200d\u0301") == "\u00e9"


@pytest.mark.parametrize("seed", range(3))
def test_paper_items_are_those_of_the_merged_question(seed):
    """Right and wrong options that repeat: each text is one option, and drawn as one."""
    rng, twice, merged = random.Random(seed), [], []
    for i in range(300):
        repeated = rng.sample(["fire", "water", "sand", "air"], 3)
        repeated.insert(rng.randrange(4), rng.choice(repeated) + "\u200b" * rng.randrange(2))
        q = SCIQ._replace(id=str(i), options=tuple(repeated), answer=rng.randrange(4))
        twice.append(q)
        merged.append(q._replace(options=tuple(q.options[n] for n in distinct(q.options)),
                                 answer=column_of(q.options, q.answer)))
    a, b = ([(i.question_id, plain(i.text), i.label) for i in items(questions, protocol="paper", seed=seed)]
            for questions in (twice, merged))
    assert a == b and {len(set(q.options)) for q in merged} == {3}
    for item in items(twice, protocol="paper", seed=seed):
        q = twice[int(item.question_id)]
        assert item.label == (plain(q.options[item.option]) == plain(q.options[q.answer]))


def test_one_label_is_refused():
    with pytest.raises(DataError, match="3 items lack a label"):
        items([BOOLQ] * 3, protocol="paper", seed=0)


# -- halves ----------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(n=st.integers(20, 150), groups=st.integers(8, 150), seed=st.integers(0, 10**6))
def test_paper_halves(n, groups, seed):
    questions = many(n, groups=groups)
    pool = items(questions, protocol="paper", seed=seed)
    try:
        labelled, transfer = halves(pool, questions, protocol="paper", seed=seed)
    except DataError:
        assert n < 60
        return
    group = {q.id: q.group for q in questions}
    assert not {group[i.question_id] for i in labelled} & {group[i.question_id] for i in transfer}
    assert sorted(labelled + transfer) == sorted(pool)
    assert labelled == [i for i in pool if i in labelled]                       # in order
    sizes = Counter(group[i.question_id] for i in pool)
    single = sum(size == 1 for size in sizes.values())
    assert abs(len(labelled) - len(transfer)) <= (1 if single >= max(sizes.values()) else max(sizes.values()))


def test_paper_halves_depend_on_the_seed_and_on_nothing_else():
    questions = many(60)
    pool = items(questions, protocol="paper", seed=0)
    a, b = (halves(pool, questions, protocol="paper", seed=s)[0] for s in (0, 1))
    assert a == halves(pool, questions[::-1], protocol="paper", seed=0)[0] and a != b
    picked = Counter(i for s in range(200) for i in halves(pool, questions, protocol="paper", seed=s)[0])
    assert all(60 <= picked[i] <= 140 for i in pool)                            # each in D_l half of the time


def test_largest_groups_first():
    sizes = {"a": 5, "b": 4, "c": 3, "d": 2}                                    # 5 + 2 = 4 + 3
    pool = [Item(f"{g}{n}", f"{g}{n}", "", 0, n % 2) for g, size in sizes.items() for n in range(size)]
    questions = [SCIQ._replace(id=i.id, group=i.id[0]) for i in pool]
    for seed in range(5):
        labelled, transfer = halves(pool, questions, protocol="paper", seed=seed)
        assert {i.id[0] for i in labelled} == {"a", "d"} and {i.id[0] for i in transfer} == {"b", "c"}


def test_halves_refuse_one_group_and_one_label():
    pool = items(questions := many(30, groups=1), protocol="paper", seed=0)
    with pytest.raises(DataError, match="in more groups"):
        halves(pool, questions, protocol="paper", seed=0)


def test_openai_halves_of_13_rows():
    """As train_test_split(0.5, seed=3) of datasets after shuffle(seed=3), on the rows 0 to 12."""
    questions = [BOOLQ._replace(id=str(i), answer=int(i % 3 == 0)) for i in range(13)]
    pool = items(questions, protocol="openai", seed=3)
    labelled, transfer = halves(pool, questions, protocol="openai", seed=3)
    assert [int(i.question_id) for i in labelled] == [7, 4, 5, 1, 11, 6]
    assert [int(i.question_id) for i in transfer] == [10, 8, 2, 3, 9, 12, 0]


PUBLIC = {  # (task, split, seed, rows): digests of [[text, label], ...] of the labelled and the transfer half
    ("sciq", "train", 0, 11679): ("f22eb3f3dd606bd9", "376cd1ffbc0805a4"),
    ("sciq", "train", 7, 501): ("94e4be01332c9ac3", "487ba843c4ba3919"),
    ("sciq", "test", 1, 1000): ("7ce07f9e17708d9a", "38ff3d045ea2bca8"),
    ("cosmosqa", "valid", 0, 2985): ("c3f41ee67d9a5a44", "ab3a6cec79349d75"),
    ("cosmosqa", "valid", 1, 2985): ("d7d80ea8b293a801", "ab6593fe8b2f593a"),
}


@needs_shared
@pytest.mark.parametrize("task, split, seed, rows", PUBLIC)
def test_openai_protocol_draw_for_draw(task, split, seed, rows):
    questions = official.grouped(getattr(official, task)(split, SHARED))[:rows]
    pool = items(questions, protocol="openai", seed=seed)
    cut = halves(pool, questions, protocol="openai", seed=seed)
    for half, digest in zip(cut, PUBLIC[task, split, seed, rows]):
        text = json.dumps([[i.text, i.label] for i in half])
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


# -- official files --------------------------------------------------------------------------------------

@needs_shared
def test_sciq_official():
    task = load_task("sciq", data_dir=SHARED)
    assert (len(task.train), len(task.test), len(list(official.sciq("valid", SHARED)))) == (11679, 1000, 1000)
    assert task.sha256 == official.FILES["sciq/SciQ.zip"][1] and "CC BY-NC 3.0:" in task.source
    first = task.train[0]
    assert prompt(first) + completion(first, first.answer) == (
        "Q: What type of organism is commonly used in preparation of foods such as cheese and yogurt? "
        "A: mesophilic organisms")
    assert all(len(q.options) == 4 and q.context == "" for q in task.train)
    places = Counter(q.answer for q in task.train)
    assert all(n / 11679 == pytest.approx(1 / 4, abs=0.01) for n in places.values())
    assert len({q.id for q in task.train + task.test}) == 12679
    groups = Counter(q.group for q in task.train)
    assert len(groups) == 11524 and max(groups.values()) == 4
    pool = items(task.train, protocol="paper", seed=0)
    labelled, transfer = halves(pool, task.train, protocol="paper", seed=0)
    assert len(pool) == 11679 and (len(labelled), len(transfer)) == (5840, 5839)
    assert task.repeated == 44 and sum(len(distinct(q.options)) < 4 for q in task.train) == 33
    for part, n in ((task.train, 11), (task.test, 2)):      # the right option's text stands there twice
        twins = 0
        for q in part:
            right = {i for i, text in enumerate(q.options) if plain(text) == plain(q.options[q.answer])}
            if len(right) > 1:
                shown = [{candidate(q, protocol, random.Random(seed)) for seed in range(99)}
                         for protocol in ("openai", "paper")]
                assert shown == [{0, 1, 2, 3}, {0, 1, 2, 3} - right | {q.answer}]
                twins += 1
        assert twins == n
    rows = json.loads(zipfile.ZipFile(SHARED / "sciq/SciQ.zip").read("SciQ dataset-2 3/train.json"))
    support = {q.id: row["support"] for q, row in zip(task.train, rows, strict=True)}
    text = {q.id: q.question for q in task.train}
    for what in (support, text):
        assert not {what[i.question_id] for i in labelled} & {what[i.question_id] for i in transfer} - {""}


@needs_shared
def test_cosmosqa_official():
    questions = official.grouped(official.cosmosqa("valid", SHARED))
    assert len(questions) == len({q.id for q in questions}) == 2985
    assert len({q.group for q in questions}) == len({q.context for q in questions}) == 2445
    assert round(100 * sum(NONE_OF_THE_ABOVE in q.options for q in questions) / 2985, 1) == 73.3
    assert round(100 * sum(q.options[q.answer] == NONE_OF_THE_ABOVE for q in questions) / 2985, 1) == 8.7
    pool = items(questions, protocol="paper", seed=0)
    assert 0.45 <= sum(i.label for i in pool) / len(pool) <= 0.55
    labelled, transfer = halves(pool, questions, protocol="paper", seed=0)
    context = {q.id: q.context for q in questions}
    assert not {context[i.question_id] for i in labelled} & {context[i.question_id] for i in transfer}
    assert abs(len(labelled) - len(transfer)) <= 1
    shortcut = [i for i in items(questions, protocol="openai", seed=0) if NONE_OF_THE_ABOVE in i.text]
    assert 0.10 < len(shortcut) / 2985 < 0.12 and not any(i.label for i in shortcut)          # peers.md 1.1


def pin(monkeypatch, folder, files):
    """Write small files in the official layout and pin them in place of the real ones."""
    table = {name: (len(body), hashlib.sha256(body).hexdigest(), [f"https://example.org/{Path(name).name}"])
             for name, body in files.items()}
    monkeypatch.setattr(official, "FILES", table)
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)


def boolq_rows(n, tag):
    return "".join(json.dumps({"question": f"is {tag}{i} a number", "title": "t", "answer": i % 3 > 0,
                               "passage": f"Passage {tag}{i // 2}."}) + "\n" for i in range(n)).encode()


BOOLQ_FILES = {"boolq/train.jsonl": boolq_rows(60, "a"), "boolq/dev.jsonl": boolq_rows(21, "b")}


def test_boolq_official_format(monkeypatch, tmp_path):
    pin(monkeypatch, tmp_path, BOOLQ_FILES)
    monkeypatch.setenv("SELW2S_DATA", str(tmp_path))
    task = load_task("boolq")
    assert (len(task.train), len(task.test)) == (60, 21)
    assert task.sha256 == "+".join(hashlib.sha256(body).hexdigest() for body in BOOLQ_FILES.values())
    assert "CC BY-SA 3.0: https://example.org/train.jsonl https://example.org/dev.jsonl" in task.source
    name = "boolq-train-4"
    assert task.train[4] == Question(name, name, "Passage a2.", "is a4 a number", YES_NO, 1)
    assert task.train[5].group == "boolq-train-4" and task.test[0].answer == 0
    pool = items(task.train, protocol="paper", seed=0)
    assert (sum(i.label for i in pool), len(pool)) == (24, 44)                  # 40 to 20 becomes 24 to 20
    assert pool[0].text == "Passage: Passage a0.\nQuestion: is a0 a number"
    assert {i.label for i in items(task.test, protocol="openai", seed=0)} == {0, 1}


def test_cosmosqa_official_format(monkeypatch, tmp_path):
    def rows(n):
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow("id context question answer0 answer1 answer2 answer3 label".split())
        writer.writerows([f"id{n}-{i}", f'He said\n"a, {i}" .', "Why ?", *"wxyz", i % 4] for i in range(n))
        return text.getvalue().encode()
    pin(monkeypatch, tmp_path, {"cosmosqa/train.csv": rows(30), "cosmosqa/valid.csv": rows(12)})
    task = load_task("cosmosqa", data_dir=tmp_path)
    assert "CC BY 4.0:" in task.source
    name = "cosmosqa-train-5"
    assert task.train[5] == Question(name, name, 'He said\n"a, 5" .', "Why ?", tuple("wxyz"), 1)
    assert task.test[5].group == name                       # one passage in train and in test: one group


def test_groups_are_chains_of_shared_keys():
    keys = [["p1", "q1"], ["p2", "q2"], ["q3", "p3"], ["p2", "q1"], ["p4"], ["p3"]]
    questions = official.grouped((SCIQ._replace(id=str(i)), k) for i, k in enumerate(keys))
    assert [q.group for q in questions] == ["0", "0", "2", "0", "4", "2"]
    assert official.key("k", ' What  IS "it"?') == official.key("k", "what is it")
    different = ("1 + 2", "1 - 2", "1 * 2", "?", "!", "C", "C++", "2", "2.", "(2)", "2?", "2,5", "2.5")
    assert len({official.key("k", text) for text in different}) == len(different)


@needs_shared
@pytest.mark.parametrize("name, groups, dropped", [("sciq", 11524, 24), ("boolq", 7904, 1453)])
def test_groups_of_the_official_tasks(name, groups, dropped):
    """Tied by passage, SciQ by wording too: the 8 of train that ask in test's words with other distractors
    have its right answer too. No wording of BoolQ stands with two passages."""
    task = load_task(name, data_dir=SHARED)
    asked = {q.group for q in task.test}
    assert len({q.group for q in task.train}) == groups
    assert sum(q.group in asked for q in task.train) == dropped
    group = {}
    for q in task.train + task.test:
        assert group.setdefault(official.key("question", q.question), q.group) == q.group


@needs_shared
def test_sciq_groups_join_on_support_but_not_on_its_absence():
    task = load_task("sciq", data_dir=SHARED)
    rows = json.loads(zipfile.ZipFile(SHARED / "sciq/SciQ.zip").read("SciQ dataset-2 3/train.json"))
    supports = {}
    for q, row in zip(task.train, rows, strict=True):
        supports.setdefault(row["support"], set()).add(q.group)
    assert len(supports.pop("")) > 1000 and {len(groups) for groups in supports.values()} == {1}


# -- download --------------------------------------------------------------------------------------------

class Served(io.BytesIO):
    def __init__(self, body, url):
        super().__init__(body)
        self.url = url


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """A pinned file that is not there, and a web that serves what the test says: (serve, path, body)."""
    body, path = BOOLQ_FILES["boolq/train.jsonl"], tmp_path / "boolq" / "train.jsonl"
    pin(monkeypatch, tmp_path, BOOLQ_FILES)
    path.unlink()

    def serve(answer, url=None):
        def urlopen(address, timeout):
            assert address.startswith("https://") and timeout
            if isinstance(answer, Exception):
                raise answer
            return Served(answer, url or address)
        monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return serve, path, body


def test_download_once(missing, tmp_path, capsys):
    serve, path, body = missing
    serve(body)
    assert len(load_task("boolq", data_dir=tmp_path).train) == 60
    assert capsys.readouterr().err == "downloading https://example.org/train.jsonl (0.0 MB)\n"
    assert path.read_bytes() == body and len(list(path.parent.iterdir())) == 2
    assert official.content("boolq/train.jsonl", tmp_path / "a" / "new" / "folder") == body
    serve(AssertionError("no network for a file that is there"))
    assert len(load_task("boolq", data_dir=tmp_path).train) == 60
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("answer, url, says", [
    (lambda body: body[:-1], None, "got 5,329 bytes"),                          # truncated
    (lambda body: body + b"x", None, "SHA-256"),                                # longer
    (lambda body: b"x" + body[1:], None, "SHA-256"),                            # altered
    (lambda body: OSError("no route to host"), None, "no route to host"),
    (lambda body: TimeoutError("timed out"), None, "timed out"),
    (lambda body: body, "http://example.org/train.jsonl", "not https"),
])
def test_bad_download_leaves_nothing(missing, tmp_path, answer, url, says):
    serve, path, body = missing
    serve(answer(body), url)
    with pytest.raises(DataError, match=says) as error:
        load_task("boolq", data_dir=tmp_path)
    for part in (str(path), "https://example.org/train.jsonl", "put it there"):
        assert part in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in path.parent.iterdir()] == ["dev.jsonl"]


def test_second_home(missing, monkeypatch, tmp_path):
    _, path, body = missing
    official.FILES["boolq/train.jsonl"][2].append("https://example.com/second")
    monkeypatch.setattr("urllib.request.urlopen",
                        lambda url, timeout: Served(body if url.endswith("second") else b"", url))
    assert len(load_task("boolq", data_dir=tmp_path).train) == 60


def test_download_reads_no_more_than_the_pinned_size(missing, tmp_path, monkeypatch):
    _, _, body = missing
    asked = []
    endless = Served(b"", "https://example.org/")
    endless.read = lambda n: asked.append(n) or b"x" * n
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: endless)
    with pytest.raises(DataError):
        load_task("boolq", data_dir=tmp_path)
    assert asked == [len(body) + 1]


def test_interrupted_write_leaves_no_file(missing, tmp_path, monkeypatch):
    serve, path, body = missing
    serve(body)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError, match="No space left on device; choose another folder"):
        load_task("boolq", data_dir=tmp_path)
    assert [p.name for p in path.parent.iterdir()] == ["dev.jsonl"]


@pytest.mark.parametrize("change", [lambda b: b + b"\n", lambda b: b[:-2], lambda b: b"[" + b[1:]])
def test_a_file_that_differs_is_refused_with_both_hashes(missing, tmp_path, change):
    _, path, body = missing
    path.write_bytes(changed := change(body))
    with pytest.raises(DataError, match="not the official file") as error:
        load_task("boolq", data_dir=tmp_path)
    digests = [hashlib.sha256(b).hexdigest() for b in (changed, body)]
    assert all(part in str(error.value) for part in (str(path), *digests, "move it away"))
    assert path.read_bytes() == changed


def test_pins():
    """Sizes of the official releases and the tail of their first home, as published."""
    assert {name: (size, homes[0][-13:]) for name, (size, _, homes) in official.FILES.items()} == {
        "sciq/SciQ.zip": (2821345, "sciq/SciQ.zip"), "boolq/train.jsonl": (6525813, "q/train.jsonl"),
        "boolq/dev.jsonl": (2238726, "olq/dev.jsonl"), "cosmosqa/train.csv": (16660449, "ata/train.csv"),
        "cosmosqa/valid.csv": (2128345, "ata/valid.csv")}
    for _, digest, homes in official.FILES.values():
        assert len(bytes.fromhex(digest)) == 32 and all(url.startswith("https://") for url in homes)


def test_data_dir_order(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SELW2S_DATA", str(tmp_path / "variable"))
    for name in ("flag", "variable", ".cache/selw2s"):
        pin(monkeypatch, tmp_path / name, {"boolq/dev.jsonl": name.encode()})
        if name == ".cache/selw2s":
            monkeypatch.delenv("SELW2S_DATA")
        data_dir = tmp_path / "flag" if name == "flag" else None
        assert official.content("boolq/dev.jsonl", data_dir) == name.encode()


# -- a user's own file -----------------------------------------------------------------------------------

def row(i, **more):
    return {"question": f"number {i}?", "options": ["one", "two", "three"], "answer": i % 3} | more


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_own_file(tmp_path):
    rows = [row(i, split="train" if i < 40 else "test") for i in range(60)]
    rows[1] |= {"answer": "three", "id": 7, "group": "g", "context": " A  passage. "}
    rows[2] |= {"options": ["Yes", "no"], "answer": "Yes", "group": "g"}
    rows[3] |= {"context": "P", "question": "other"}
    rows[4] |= {"context": "p.", "answer": 0}
    rows[5] |= {"question": "NUMBER 6", "context": None}
    rows[6] |= {"question": "one\u2028line \u00e9"}
    path = write(tmp_path / "mine.jsonl", rows)
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes().replace(b"\n", b"\r\n\r\n"))
    task = load_task(path)
    assert (task.name, len(task.train), len(task.test)) == ("mine", 40, 20)
    assert task.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert task.train[0] == Question("line1", "line1", "", "number 0?", ("one", "two", "three"), 0)
    assert task.train[1] == Question("7", "7", "A  passage.", "number 1?", ("one", "two", "three"), 2)
    assert task.train[2] == Question("line5", "7", "", "number 2?", YES_NO, 1)
    assert task.train[3].group == task.train[4].group == "line7"
    assert task.train[6].question == "one\u2028line \u00e9" and task.repeated == 0
    rows[3] |= {"group": "a"}           # where it is given, it alone decides
    rows[4] |= {"group": "b"}
    rows[7] |= {"group": "c"}
    rows[8] |= {"group": "c"}
    rows[9] |= {"context": "P", "question": "third"}
    apart = load_task(write(tmp_path / "apart.jsonl", rows)).train
    assert [q.group for q in apart[3:5] + apart[7:10]] == ["line4", "line5", "line8", "line8", "line10"]


def test_own_file_with_options_that_repeat(tmp_path):
    """Each text once, where it stands first; the answer follows; the rest of the file as ever."""
    rows, twins = [row(i) for i in range(60)], ["a", "b ", "b", "c", "\u200ba"]
    for i in range(5):
        rows[i] |= {"options": twins, "answer": i}
    rows[5] |= {"options": twins, "answer": "\tb\u200d"}
    rows[6] |= {"options": ["no\u00a0", "Yes", "no"], "answer": 2}
    rows[7] |= {"options": ["a", "A", "a."], "answer": 1, "context": "\u200b"}
    task = load_task(write(tmp_path / "twins.jsonl", rows))
    by_id = {q.id: q for q in task.train + task.test}
    found = [by_id[f"line{i + 1}"] for i in range(8)]
    assert {q.options for q in found[:6]} == {("a", "b ", "c")}
    assert [q.answer for q in found[:6]] == [0, 1, 1, 2, 0, 1]
    assert found[6][4:6] == (YES_NO, 0) and found[7][2:6] == ("", "number 7?", ("a", "A", "a."), 1)
    assert len(by_id) == 60 and task.repeated == 6 * 2 + 1


def test_an_index_that_is_another_options_text_too_is_warned_of_once(tmp_path, capsys):
    rows = [row(i) for i in range(60)]
    rows[3] |= {"options": ["0", "1", "2"], "answer": 1}        # the index and the text of one option
    rows[4] |= {"options": ["1", "2", "3"], "answer": "2"}      # a text
    rows[5] |= {"options": ["4", "4 ", "5"], "answer": 1}       # option 1 is option 0, and neither is "1"
    load_task(write(tmp_path / "clear.jsonl", rows))
    assert capsys.readouterr().err == ""
    rows[6] |= {"options": ["1", " 2", "3"], "answer": 2}
    rows[8] |= {"options": ["3", "1", "2", "0"], "answer": 0}
    path = write(tmp_path / "doubtful.jsonl", rows)
    task = load_task(path)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"selw2s: warning: {path}:7: ") and "(2 such line(s))" in line
    answers = {q.id: q.answer for q in task.train + task.test}
    assert answers["line7"] == 2 and answers["line9"] == 0 == answers["line6"]


def left_out(tmp_path, train, test):
    """How many training questions of a file are left out as test asks them: at most the first; 70 differ."""
    rest = [row(i, split="train" if i < 70 else "test") for i in range(30, 100)]
    rows = [row(0, split="train") | train, row(0, split="test") | test, *rest]
    return fit(load_task(write(tmp_path / "pair.jsonl", rows)), [], 999)[1]["left_out"]


@pytest.mark.parametrize("train, test, same", [
    ({}, {}, True),
    ({"question": "NUMBER  0"}, {"question": "number 0 ?!"}, True),
    ({"question": "cafe\u0301"}, {"question": "caf\u00e9\u200b"}, True),
    ({"options": ["three", "ONE", "two."], "answer": 1}, {}, True),             # in any order
    ({"options": ["one", "two", "three", "two"]}, {}, True),
    ({"question": "Which is one?", "options": ["cat", "fir"]}, {"question": "Which is one?"}, False),
    ({"options": ["one", "two", "four"]}, {}, False),
    ({"question": "2."}, {"question": "2?"}, False), ({"question": "2"}, {"question": "(2)"}, False),
    ({"options": ["2.", "3"], "answer": 0}, {"options": ["(2)", "3"], "answer": 0}, False),
    ({"context": "A passage."}, {"context": "a  passage", "question": "Who?"}, True),
    ({"context": "One."}, {"context": "Two."}, False), ({"context": "One."}, {}, False),
    ({"group": "a"}, {"group": "b"}, False), ({"group": "a"}, {"group": "a", "question": "Who?"}, True),
    ({"group": "a", "context": "One."}, {"group": "b", "context": "One."}, False),
    ({"group": "a"}, {}, False),
])
def test_two_questions_are_the_same_when_context_wording_and_options_are(tmp_path, train, test, same):
    assert left_out(tmp_path, train, test) == int(same)


def test_one_wording_many_questions(tmp_path):
    """As in COPA and ARC: 'Which of these is a mammal?' of other options is another question."""
    rows = [row(i, question="Which of these is it?", options=[f"a{i}", f"b{i}"], answer=i % 2,
                split="train" if i < 700 else "test") for i in range(900)]
    task, counts = fit(load_task(write(tmp_path / "arc.jsonl", rows)), [], 999)
    assert (len(task.train), len(task.test), counts["left_out"]) == (700, 200, 0)


def test_split_by_group_is_a_fifth_and_fixed(tmp_path):
    task = load_task(write(tmp_path / "a.jsonl", [row(i, group=i // 2, id=f"q{i}") for i in range(100)]))
    assert (len(task.train), len(task.test)) == (80, 20)
    assert not {q.group for q in task.train} & {q.group for q in task.test}
    order = sorted((f"q{i}" for i in range(0, 100, 2)), key=lambda g: hashlib.sha256(g.encode()).hexdigest())
    assert {q.group for q in task.test} == set(order[:10])


BAD = {  # what stands on line 3: what the error says after "file:3: "
    '{"question": "q", "options": ["a", "b"]}': '"answer" is missing',
    '{"question": "q", "options": ["a", "b"], "answer": null}': '"answer" is missing',
    '{"options": ["a", "b"], "answer": 0}': '"question" is missing',
    '{"question": 3, "options": ["a", "b"], "answer": 0}': '"question" must be str, found 3',
    '{"question": "q", "options": "ab", "answer": 0}': "\"options\" must be list, found 'ab'",
    '{"question": "q", "options": ["a", 2], "answer": 0}': "every option must be a text",
    '{"question": "q", "options": ["a", ["b"]], "answer": 0}': "every option must be a text",
    '{"question": "q", "options": ["a", " "], "answer": 0}': "not empty",
    '{"question": "", "options": ["a", "b"], "answer": 0}': "not empty",
    '{"question": "q", "options": ["a"], "answer": 0}': "give two or more",
    '{"question": "q", "options": [], "answer": 0}': "give two or more",
    '{"question": "q", "options": ["a", " a", "a\\u200b"], "answer": 1}': "3 options, 1 different; give two",
    '{"question": "q", "options": ["\\u00e9", "e\\u0301"], "answer": 1}': "2 options, 1 different",
    '{"question": "q", "options": ["a", "\\u200b"], "answer": 0}': "not empty",
    '{"question": "\\u200b", "options": ["a", "b"], "answer": 0}': "not empty",
    '{"question": "q", "options": ["a", "b", "b "], "answer": 3}': "an index from 0 to 2",
    '{"question": "q", "options": ["a", "b"], "answer": 2}': "neither an option nor an index from 0 to 1",
    '{"question": "q", "options": ["a", "b"], "answer": -1}': '"answer" -1 is neither',
    '{"question": "q", "options": ["a", "b"], "answer": "c"}': "\"answer\" 'c' is neither",
    '{"question": "q", "options": ["a", "b"], "answer": "0"}': "\"answer\" '0' is neither",
    '{"question": "q", "options": ["a", "b"], "answer": true}': '"answer" must be int or str, found True',
    '{"question": "q", "options": ["a", "b"], "answer": 0.0}': '"answer" must be int or str, found 0.0',
    '{"question": "q", "options": ["a", "b"], "answer": 0, "id": "line1"}': "id 'line1' is line 1's too",
    '{"question": "q", "options": ["a", "b"], "answer": 0, "id": [1]}': '"id" must be str or int',
    '{"question": "q", "options": ["a", "b"], "answer": 0, "context": 5}': '"context" must be str',
    '{"question": "q", "options": ["a", "b"], "answer": 0, "contxt": "c"}': "unknown key 'contxt'; known are",
    '{"question": "q", "options": ["a", "b"], "answer": 0, "split": "dev"}': "found 'dev'",
    '{"question": "q", "options": ["a", "b"], "answer": 0, "split": "test"}': "on every line or on none",
    '{"question": "\\ud800", "options": ["a", "b"], "answer": 0}': "surrogates not allowed",
    '{"question": "q", "options": ["a", "b"], "answer": 0, "id": "\\udfff"}': "surrogates not allowed",
    '{"question": "q", "options": ["a", "b"], "answer": 1' + "0" * 5000 + "}": "5001 digits",
    '{"question": "q", "options": ["a", "b"], "answer": 0,}': "not JSON: ",
    '["q"]': "not an object like {",
    '7': "not an object like {",
    "[" * 100_000: "recursion",
    "q\ud8ff": "not UTF-8; save the file as UTF-8",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_line(tmp_path, line):
    good = json.dumps(row(0))
    path = tmp_path / "bad.jsonl"
    path.write_bytes(f"{good}\n\n".encode() + line.encode(errors="surrogatepass") + f"\n{good}\n".encode())
    with pytest.raises(DataError) as error:
        load_task(str(path))
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and BAD[line] in message
    assert "\n" not in message and len(message) < 300 + len(str(path))


def test_bad_file(tmp_path):
    yes = {"options": ["yes", "no"], "answer": "yes"}
    cases = [([], "0 training question"), ([row(i, split="train") for i in range(50)], "0 test question"),
             ([row(i) for i in range(45)], "9 test question(s) are too few; give 10 or more"),
             ([row(i, split="test" if i > 18 else "train") for i in range(50)], "19 training question"),
             ([row(i, context="one passage") for i in range(99)], "0 training question"),
             ([row(i, **yes) for i in range(99)], "all training answers are yes"),
             ([row(i, split="train") for i in range(60)] + [row(i, **yes, split="test") for i in range(60)],
              "all test answers are yes; give yes and no")]
    for rows, says in cases:
        with pytest.raises(DataError) as error:
            load_task(write(tmp_path / "f.jsonl", rows))
        assert says in str(error.value) and str(tmp_path) in str(error.value)
    for path in (str(tmp_path / "none.jsonl"), "zero\0byte.jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            load_task(path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="folder.jsonl: cannot be read: Is a directory"):
        load_task(str(tmp_path / "folder.jsonl"))


def test_demo_tasks_come_from_the_world(monkeypatch):
    monkeypatch.setattr(world, "task", lambda name: Task(name, many(20), many(10), "", ""))
    names = [load_task(name).name for name in DEMO]
    assert names == ["demo-sciq", "demo-sciq", "demo-boolq", "demo-cosmosqa"]


def test_unknown_task_lists_the_known():
    with pytest.raises(DataError) as error:
        load_task("scig")
    assert all(name in str(error.value) for name in (*DEMO, *OFFICIAL, ".jsonl", "'scig'"))


GOOD = "".join(json.dumps(row(i, split="train" if i < 25 else "test")) + "\n" for i in range(40)).encode()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(st.text(max_size=2), SCALARS, max_size=2)
ROWS = st.fixed_dictionaries(
    {"question": st.text(max_size=4) | VALUES, "answer": st.integers(-1, 4) | VALUES,
     "options": st.lists(st.sampled_from(["yes", "No", "a", "b", ""]), max_size=4) | VALUES},
    optional={key: VALUES for key in ("context", "id", "group", "split", "extra")})


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(ROWS, max_size=4), place=st.integers(0, 3000), cut=st.integers(0, 40), junk=st.binary())
def test_fuzz_gives_a_task_or_a_data_error(tmp_path_factory, rows, place, cut, junk):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    random_rows = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(random_rows + GOOD[:place] + junk + GOOD[place + cut:])
    try:
        task = load_task(str(path))
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert all(0 <= q.answer < len(q.options) == len(distinct(q.options)) > 1
                   for q in task.train + task.test)


# -- finished stages ---------------------------------------------------------------------------------------

def test_peak_memory_of_every_system(monkeypatch):
    """ru_maxrss is in KiB, on macOS in bytes; Windows has no such module, and no number."""
    import resource
    usage = type("Usage", (), {"ru_maxrss": 3_000_000})
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    for platform, peak in (("linux", 3.072), ("darwin", 0.003)):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache.peak_gb("cpu") == peak
    monkeypatch.setitem(sys.modules, "resource", None)
    assert cache.peak_gb("cpu") is None


# -- the same in every process ---------------------------------------------------------------------------

def test_processes_agree(tmp_path):
    path = write(tmp_path / "own.jsonl", [row(i) for i in range(80)])
    program = (f"from data import *; t = load_task({path!r}); p = items(t.train, protocol='paper', seed=5); "
               "print(p, halves(p, t.train, protocol='paper', seed=5), [q.group for q in t.test])")
    first, second = (subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": s},
                                    capture_output=True, check=True).stdout for s in ("1", "2"))
    assert first == second


def test_a_yes_no_question_is_known_by_its_options_not_by_their_object():
    q = Question("a", "a", "", "is it red", tuple("no yes".split()), 1)
    assert completion(q, 1) == "\nAnswer: yes"
    assert completion(q._replace(options=("no", "yes", "so")), 1) == " yes"
