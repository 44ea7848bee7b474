"""Questions, binary items and the two halves: step 1 of the method (setting: Burns et al. 2023, App. A).

A question with k options becomes one binary item: one candidate is shown, the label says whether it is right.
The training items are cut into

    D_l   labelled   the labelled half, whose ground truth is used
    D_u   transfer   the transfer half, whose ground truth nothing reads but ceiling, oracle and the metrics,
                     once its items are drawn (drawing balances the classes [D12])

in one of two protocols. paper: no class above 55 %, halves disjoint by group (one passage, one question).
openai: items and halves draw for draw as in the public code, so that published numbers can be compared; its
halves are disjoint by question only.

official.py reads SciQ, BoolQ and CosmosQA, jsonl.py a user's own file, world.py makes the demo.
"""
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

YES_NO = ("no", "yes")
NONE_OF_THE_ABOVE = "None of the above choices ."
OFFICIAL = ("sciq", "boolq", "cosmosqa")
DEMO = ("demo", "demo-sciq", "demo-boolq", "demo-cosmosqa")
MIN_TRAIN, MIN_TEST = 20, 10
ZERO_WIDTH = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))


class DataError(ValueError):
    """What a user can get wrong about data; the message is one line: what is wrong, where, what to do."""


class Question(NamedTuple):
    id: str
    group: str                  # questions of one group stay in one half
    context: str                # the passage in the text, or "" (SciQ's support is not in the text)
    question: str
    options: tuple[str, ...]    # YES_NO in a yes/no question
    answer: int                 # index of the right option
    weak: tuple = ()            # labels that came with it: (supervisor, P of every option, None: it abstains)
    transcripts: tuple[str, ...] = ()   # of debates on it, one per supervisor that reads one


class Item(NamedTuple):
    id: str                     # "{question_id}/{option}"
    question_id: str
    text: str                   # ends in the candidate; a yes/no question is itself the item
    option: int                 # index of the candidate shown; of a yes/no question always 1, "yes"
    label: int                  # ground truth: 1 if that option is right, else 0


class Task(NamedTuple):
    name: str
    train: list[Question]
    test: list[Question]
    sha256: str                 # of the file, or of the files, joined by "+"
    source: str                 # origin and licence
    repeated: int = 0           # options of its files that repeat another of their question: counted once


def plain(text: str) -> str:
    """What decides whether two texts are equal: NFC, no zero-width characters, nothing blank at the ends."""
    return unicodedata.normalize("NFC", text.translate(ZERO_WIDTH)).strip()


def distinct(options: Sequence[str]) -> list[int]:
    """Index of the first option of each text: options whose texts are equal (`plain`) are one option."""
    first = {}
    for i, text in enumerate(map(plain, options)):
        first.setdefault(text, i)
    return list(first.values())


def column_of(options: Sequence[str], option: int) -> int:
    """The place in `distinct` of the text of option number `option`. All options of one text have one column
    of scores: they share one option's probability, and count once in the sum over options."""
    texts = list(map(plain, options))
    return list(dict.fromkeys(texts)).index(texts[option])


def prompt(question: Question) -> str:
    """The question before any candidate, in the format of the public code; its structure says which."""
    if question.options == YES_NO and question.context:                         # BoolQ
        return f"Passage: {question.context}\nQuestion: {question.question}"
    if question.options == YES_NO:
        return f"Question: {question.question}"
    if question.context:                                                        # CosmosQA
        return f"Context: {question.context}\nQuestion: {question.question}\nAnswer:"
    return f"Q: {question.question} A:"                                         # SciQ


def completion(question: Question, option: int) -> str:
    """What follows `prompt` if the answer is option number `option`."""
    return ("\nAnswer: " if question.options == YES_NO else " ") + question.options[option]


def options_of(questions: list[Question]) -> list[list[str]]:
    """Every option of every question as it follows the prompt, once where several have the same text."""
    return [[completion(q, i) for i in distinct(q.options)] for q in questions]


def columns_shown(part: list[Item], questions: list[Question]) -> list[int]:
    """Of every item, the place in `options_of` of the candidate it shows."""
    return [column_of(q.options, item.option) for item, q in zip(part, questions)]


def judged(item: Item, question: Question) -> str:
    """The prompt that asks whether the candidate shown is right (of a yes/no question: "yes"), after Burns'
    Table 2."""
    return (prompt(question) + completion(question, item.option)
            + "\nRespond with 1 if the answer is correct, and with 0 otherwise.\nResponse:")


def unconditional(question: Question) -> str:
    """The prompt's last word, without the question."""
    return "Question:" if question.options == YES_NO else prompt(question).split()[-1]


def permutation(n: int, seed: int):
    """Of range(n), as the public code's libraries draw it."""
    import numpy as np      # here, as --help does not wait for it
    return np.random.default_rng(seed).permutation(n)


def candidate(q: Question, protocol: str, rng: random.Random) -> int:
    """The option shown; one random() for a question, one choice() where a wrong one is shown, in the public
    code's order of draws.

    paper: options of one text are one, and none that repeats the right one is wrong. openai: as in the public
    code, each is an option of its own, and in SciQ (no context) one that repeats the right one is wrong."""
    right = q.options[q.answer]
    never = protocol == "openai" and NONE_OF_THE_ABOVE in right     # draws no random() [D7]
    if not never and rng.random() < 0.5:
        return q.answer
    if protocol == "openai":
        return rng.choice([i for i, text in enumerate(q.options)
                           if i != q.answer and (text != right or not q.context)])
    return rng.choice([i for i in distinct(q.options) if plain(q.options[i]) != plain(right)])


def items(questions: list[Question], *, protocol: str, seed: int) -> list[Item]:
    """One binary item per question; same questions and seed, same items, in every process.

    With probability 1/2 the right option, label 1, else a wrong one at random, label 0; a yes/no question is
    itself the item, label = answer. Raises DataError if all labels are equal.
    paper: a class above 55 % loses items at random until it is not; "None of the above" is any option [D7].
    openai: unbalanced; "None of the above" is not shown where it is right; shuffled like the public code."""
    assert protocol in ("paper", "openai"), protocol
    rng, pool = random.Random(seed), []
    for q in questions:
        option, text = 1, prompt(q)
        if q.options != YES_NO:
            option = candidate(q, protocol, rng)
            text += completion(q, option)
        pool.append(Item(f"{q.id}/{option}", q.id, text, option, int(option == q.answer)))
    if len({item.label for item in pool}) < 2:
        raise DataError(f"these {len(pool)} items lack a label, 0 or 1; give more questions, of both answers")
    if protocol == "openai":                                                    # Dataset.shuffle(seed)
        return [pool[i] for i in permutation(len(pool), seed)]
    small, large = sorted(([i for i, item in enumerate(pool) if item.label == y] for y in (0, 1)), key=len)
    # a class above 55 % is thinned [D12]
    drop = set(rng.sample(large, max(0, len(large) - len(small) * 11 // 9)))    # 55 % : 45 % = 11 : 9
    return [item for i, item in enumerate(pool) if i not in drop]


def deal(items: list[Item], questions: list[Question], parts: int, rng: random.Random) -> list[int]:
    """The part, 0 to parts - 1, of each item; `questions` holds the items' own. Whole groups, largest first
    and at random among equals, each to the part with fewest items so far (to the first of equals)."""
    group = {q.id: q.group for q in questions}
    sizes = Counter(group[item.question_id] for item in items)
    names = sorted(sizes)
    rng.shuffle(names)
    counts, part = [0] * parts, {}
    for name in sorted(names, key=sizes.get, reverse=True):                     # stable: random among equals
        part[name] = counts.index(min(counts))
        counts[part[name]] += sizes[name]
    return [part[group[item.question_id]] for item in items]


def halves(items: list[Item], questions: list[Question], *, protocol: str, seed: int
           ) -> tuple[list[Item], list[Item]]:
    """(labelled, transfer) = D_l, D_u; `questions` holds the items' own. DataError if a half lacks a label.

    paper: dealt out by group, so that they differ by one item at most where there are enough groups of one.
    openai: train_test_split(0.5, seed); its "train" is labelled, its "test" (larger, if odd) is transfer."""
    assert protocol in ("paper", "openai"), protocol
    if protocol == "openai":
        order = permutation(len(items), seed)
        n_transfer = (len(items) + 1) // 2
        labelled, transfer = [items[i] for i in order[n_transfer:]], [items[i] for i in order[:n_transfer]]
    else:
        side = deal(items, questions, 2, random.Random(f"halves {seed}"))
        labelled, transfer = ([item for item, s in zip(items, side) if s == half] for half in (0, 1))
    assert not {i.question_id for i in labelled} & {i.question_id for i in transfer}
    if any(len({i.label for i in half}) < 2 for half in (labelled, transfer)):
        raise DataError(f"{len(items)} items do not make two halves with both labels in each; "
                        "give more questions, in more groups")
    return labelled, transfer


def fit(task: Task, encoders, room: int, *, apart: bool = True, limit: int = 0) -> tuple[Task, dict]:
    """The task as all models can read it, and counts: questions left out, contexts cut.

    A context is cut at its end, by words (by characters where it has no spaces), until no text of its
    question has more than `room` tokens of any encoder (texts -> token ids): one text for all models, no item
    dropped (the public code drops, in test too) [D11]. apart: training questions that test asks, or whose
    passage it has, are left out. limit: at most so many questions a part. DataError for a question that is
    too long without its context."""
    def excess(q):
        texts = [prompt(q) + completion(q, i) for i in range(len(q.options))]
        return max((len(ids) for encode in encoders for ids in encode(texts)), default=0) - room

    def cut(q):
        most = len(prompt(q).encode()) + max(len(o.encode()) for o in q.options) + 64   # a token has a byte
        if most <= room or (over := excess(q)) <= 0:
            return q
        pieces, between = q.context.split(" "), " "
        while over > 0 and q.context:
            if len(pieces) == 1:                        # what is left has no spaces: by characters
                pieces, between = list(q.context), ""
            pieces = pieces[:-max(1, len(pieces) * over // (2 * (over + room)))]
            q = q._replace(context=between.join(pieces))                        # cut, never dropped [D11]
            over = excess(q)
        if over > 0:
            raise DataError(f"question {q.id} is {over} tokens over the models' {room} "
                            "even without its context: shorten it")
        return q
    seen = {q.group for q in task.test} if apart else ()
    train = [q for q in task.train if q.group not in seen]
    if task.train and not train:
        raise DataError(f"{task.name}: no training question is left: test asks them all or has their "
                        "passages; give others, in other groups")
    before = train[:limit or None] + task.test[:limit or None]
    after = [cut(q) for q in before]
    counts = {"left_out": len(task.train) - len(train), "cut": sum(a is not b for a, b in zip(before, after))}
    n = len(train[:limit or None])
    return task._replace(train=after[:n], test=after[n:]), counts


def check_transcripts(questions: list[Question], models: Sequence, titles: list[str]) -> None:
    """DataError for a transcript that does not fit into its supervisor's context in front of its question;
    the supervisors' selw2s.Pretrained and titles."""
    for q in questions:
        for text, model, title in zip(q.transcripts, models, titles):
            whole = [f"{text}\n{prompt(q)}{option}" for option in options_of([q])[0]]
            tokens, room = max(map(len, model.tokenizer.encode(whole))), model.network.config.context
            if tokens > room:
                raise DataError(f"question {q.id}: with its transcript for {title} it has "
                                f"{tokens} tokens, over the model's {room}: shorten it")


def load_task(name: str, *, data_dir: str | None = None) -> Task:
    """A task by name, or a user's own by a path that ends in .jsonl; raises DataError.

    data_dir: where official files lie or are downloaded to; else $SELW2S_DATA, else ~/.cache/selw2s."""
    from data import jsonl, official, world      # here, because they import this module
    if name.endswith(".jsonl"):
        task = jsonl.load(name)
    elif name in OFFICIAL:
        task = official.load(name, data_dir)
    elif name in DEMO:
        task = world.task("demo-sciq" if name == "demo" else name)
    else:
        raise DataError(f"unknown task {name!r}; known are {', '.join(DEMO + OFFICIAL)} and paths in .jsonl")
    for split, questions, least in ("training", task.train, MIN_TRAIN), ("test", task.test, MIN_TEST):
        if len(questions) < least:
            raise DataError(f"{name}: {len(questions)} {split} question(s) are too few; give {least} or more")
        if {(q.options, q.answer) for q in questions} in ({(YES_NO, 0)}, {(YES_NO, 1)}):
            raise DataError(f"{name}: all {split} answers are {YES_NO[questions[0].answer]}; give yes and no")
    return task


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """write(a temporary name), which then becomes `path`: readers find the file whole, or as it was."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")   # two containers may have one pid
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
