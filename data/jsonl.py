"""A user's own task in, the refined labels out: UTF-8, one JSON object per line.

    {"question": "...", "options": ["...", "..."], "answer": 1}
    optional: "context": passage, "id": unique, "group": what stays in one half, "split": "train" or "test",
              "weak": weak labels, "transcripts": texts, one per supervisor that reads one

"answer" is the index of the right option, from 0, or its text. Options of one text (`data.plain`) are one, at
the place of the first; yes and no, in any order or case, make a yes/no question. "group" decides alone where
it is given; else questions on one context form a group, or, without a context, those of one wording and the
same options, in any order. "split" stands on every line or on none; then the groups, in the order of their
names' SHA-256, fill the test set until it has a fifth of the questions. "weak" is the probability of every
option, [0.1, 0.9], or of several supervisors by name, {"ann": [0, 1], "bob": null}: a vote is 0 and 1, null
is who abstains. Every training question has the same supervisors, in the order of the first one's, and one of
them at least labels it; a test question has them or none. Every error names file and line.
"""
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from data import YES_NO, DataError, Question, Task, column_of, distinct, plain
from data.official import grouped, key

TYPES = {"question": (str,), "options": (list,), "answer": (int, str), "context": (str,), "id": (str, int),
         "group": (str, int), "split": (str,), "weak": (list, dict), "transcripts": (list,)}


def _once(pairs: list[tuple]) -> dict:
    """An object, from its keys and values; raises ValueError where one value would hide another."""
    if twice := [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]:
        raise ValueError(f"key {twice[0][:40]!r} stands there twice")
    return dict(pairs)


def _row(line: bytes) -> dict:
    """The object on a line, its keys known and of the right types; raises ValueError."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError('not an object like {"question": "...", "options": ["...", "..."], "answer": 0}')
    row = {name: value for name, value in row.items() if value is not None}
    if missing := [name for name in ("question", "options", "answer") if name not in row]:
        raise ValueError(f'"{missing[0]}" is missing')
    for name, value in row.items():
        if name not in TYPES:
            raise ValueError(f"unknown key {name[:40]!r}; known are {', '.join(TYPES)}")
        if not isinstance(value, TYPES[name]) or isinstance(value, bool):
            kinds = " or ".join(kind.__name__ for kind in TYPES[name])
            raise ValueError(f'"{name}" must be {kinds}, found {value!r:.40}')
    if row.get("split", "train") not in ("train", "test"):
        raise ValueError(f'"split" must be "train" or "test", found {row["split"][:40]!r}')
    return row


def _weak(row: dict, places: list[int]) -> tuple:
    """The row's weak labels by supervisor, of every option that counts; places: where each option of the row
    is among those. Raises ValueError."""
    given, out = row.get("weak", {}), []
    if isinstance(given, list):
        given = {"weak": given}
    for name, p in given.items():
        if p is not None:
            numbers = isinstance(p, list) and all(type(x) in (int, float) and 0 <= x <= 1 for x in p)
            if not numbers or len(p) != len(places) or abs(sum(p) - 1) > 0.02:
                raise ValueError(f'"weak" of {name[:40]!r} must be null or {len(places)} probabilities, one '
                                 f"per option, that sum to 1; found {p!r:.60}")
            p = tuple(sum(x for x, at in zip(p, places) if at == i) / sum(p) for i in range(max(places) + 1))
        out.append((name, p))
    return tuple(out)


def _question(row: dict, name: str) -> Question:
    """The question in a checked row, called `name` if it has no id; raises ValueError."""
    options, answer = row["options"], row["answer"]
    texts = [row["question"], *options]
    if not all(isinstance(text, str) and plain(text) for text in texts):
        raise ValueError('"question" and every option must be a text that is not empty')
    kept = [options[i] for i in distinct(options)]
    if len(kept) < 2:
        raise ValueError(f"{len(options)} options, {len(kept)} different; give two or more that differ")
    choices = [plain(option) for option in options]
    if isinstance(answer, str) and plain(answer) in choices:
        answer = choices.index(plain(answer))
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        last = len(options) - 1
        raise ValueError(f'"answer" {answer!r:.40} is neither an option nor an index from 0 to {last}')
    places = [column_of(options, i) for i in range(len(options))]
    words = [plain(option).casefold() for option in kept]
    if sorted(words) == list(YES_NO):
        places, kept = [YES_NO.index(words[place]) for place in places], YES_NO
    transcripts = row.get("transcripts", [])
    if not all(isinstance(text, str) and plain(text) for text in transcripts):
        raise ValueError('"transcripts" must be texts that are not empty')
    context = row.get("context", "").strip()
    if not plain(context):
        context = ""
    question = Question(str(row.get("id", name)), str(row.get("group", "")), context, row["question"],
                        tuple(kept), places[answer], _weak(row, places), tuple(transcripts))
    supervisors = [name for name, _ in question.weak]
    # ValueError on half a surrogate pair, which JSON can spell
    "".join((*texts, *question[:3], *transcripts, *supervisors)).encode()
    return question


def _tie(question: Question) -> str:
    """What questions of one group share: "group" if given, else the passage, else wording and options."""
    if question.group:
        return "group " + question.group
    if question.context:
        return key("passage", question.context)
    options = sorted(key("option", option) for option in question.options)
    return "\n".join([key("question", question.question), *options])


def _doubtful(row: dict, question: Question) -> bool:
    """Whether the answer of a row is an index that is also the text of an option it does not point to."""
    others = {plain(option) for i, option in enumerate(question.options) if i != question.answer}
    return isinstance(row["answer"], int) and str(row["answer"]) in others


def _differs(question: Question, split: str, first: Question) -> str:
    """Where a question's supervisors or transcripts are not those of the first training question; "" if they
    are."""
    names, others = ({name for name, _ in q.weak} for q in (question, first))
    if names != others and (names or split == "train"):
        mine, theirs = (", ".join(f"{name[:40]!r}" for name in sorted(some)[:9]) or "nobody"
                        for some in (names, others))
        return f'"weak" by {mine}, not by {theirs}'
    if names and split == "train" and all(p is None for _, p in question.weak):
        return '"weak" by nobody: one supervisor must label a training question'
    if len(question.transcripts) != len(first.transcripts):
        return f'{len(question.transcripts)} "transcripts", not {len(first.transcripts)}'
    return ""


def load(path: str) -> Task:
    """The task in a .jsonl file, in the file's order; raises DataError."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:       # ValueError: a zero byte in the path
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    rows, splits, lines, doubtful, repeated = [], [], {}, [], 0
    for n, line in enumerate(content.splitlines(), 1):  # bytes: of str it also cuts at U+2028 in a JSON text
        if not line.strip():
            continue
        try:
            row = _row(line)
            question = _question(row, f"line{n}")
            if (before := lines.setdefault(question.id, n)) != n:
                raise ValueError(f"id {question.id[:40]!r} is line {before}'s too; ids must differ")
            splits.append(row.get("split"))
            if (splits[-1] is None) != (splits[0] is None):
                raise ValueError('"split" must stand on every line or on none')
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{n}: {error}") from None
        rows.append((question, [_tie(question)]))
        repeated += len(row["options"]) - len(question.options)
        if _doubtful(row, question):
            doubtful.append(n)
    if doubtful:
        print(f'selw2s: warning: {path}:{doubtful[0]}: "answer" is taken as an index, from 0, but it is '
              f"another option's text too ({len(doubtful)} such line(s)): quote it if the text is meant",
              file=sys.stderr)
    questions = grouped(rows)
    if None in splits:
        sizes, left, side = Counter(q.group for q in questions), len(questions) / 5, {}
        for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
            side[group] = "test" if left > 0 else "train"
            left -= sizes[group]
        splits = [side[q.group] for q in questions]
    first = next((q for q, s in zip(questions, splits) if s == "train"), None)
    for q, split in zip(questions, splits):
        if first and (fault := _differs(q, split, first)):
            raise DataError(f"{path}:{lines[q.id]}: {fault}; line {lines[first.id]} is the first of training")
    names = [name for name, _ in first.weak] if first else []   # their order too is the first one's
    questions = [q._replace(weak=tuple((name, dict(q.weak)[name]) for name in names if q.weak))
                 for q in questions]
    train, test = ([q for q, s in zip(questions, splits) if s == part] for part in ("train", "test"))
    return Task(Path(path).stem, train, test, hashlib.sha256(content).hexdigest(), f"user's own file {path}",
                repeated)


# ------------------------------------------------------------------------------------------------- labels out
TEXTS = ("question_id", "text", "candidate")        # of a row: what the arrays of a run do not hold


def label_rows(run: dict) -> list[dict]:
    """labels.jsonl of one seed, a row per item of D_u: the soft labels of `selective`, and what they were
    made of. run: selw2s.record's; (n_u,) float32 arrays come as their shortest decimals, so that they are the
    same float32 again when read.

    weak: P(y = 1) by supervisor, null where one abstains. source: own, where routed; else smoothed, or weak
    where smoothing is off. refined: what smoothing leaves of the item's prior, which is own where routed
    (--anchors 1), else weak. label: P(y = 1), own where routed, else refined."""
    def decimals(name):
        return [None if np.isnan(x) else float(str(x)) for x in run["transfer"][name]]
    u, rows, supervisors = run["transfer"], [], run["supervisors"]
    rest = "smoothed" if run["smoothing"]["alpha"] else "weak"
    by_supervisor = zip(*(decimals(f"weak/{i}") for i in range(len(supervisors))))
    columns = (u["id"], u["group"], u["is_self"], *map(decimals, ("own", "p_ik", "refined")), by_supervisor)
    for (name, group, is_self, own, p_ik, refined, weak), *texts in zip(
            zip(*columns), *(run["texts"][key] for key in TEXTS), strict=True):
        question_id, text, candidate = texts
        rows.append({"id": str(name), "question_id": question_id, "group": str(group), "text": text,
                     "candidate": candidate, "weak": dict(zip(supervisors, weak)), "own": int(own),
                     "p_ik": p_ik, "refined": refined, "source": "own" if is_self else rest,
                     "label": own if is_self else refined, "seed": run["seed"]})
    return rows
