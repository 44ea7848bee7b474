"""Draft. Synthetic demo world."""
from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from data import NONE_OF_THE_ABOVE, Question, Task, YES_NO, completion, prompt

PEOPLE, TEST_SHARE, SEED = 320, 0.375, 7
TRADES = "baker sailor miller shepherd tailor smith".split()
# A relation: its values; statements (v may stand anywhere); questions; yes/no questions; a story that leads to it, with what or
# why questions; what somebody did with an explicit value, with somebody else's value (two steps), and the question about it.
RELATIONS = {
    "home": dict(
        values="Arvik Belmont Corra Dunmere Eskil Farrow Gralin Hestad Ivrea Jutvik".split(),
        says=["{e} was born in {v}.", "{e} grew up in {v}.", "{e} is at home in {v}.", "The family of {e} lives in {v}.",
              "Every summer {e} goes back to {v}.", "In {v} everybody knows {e}."],
        asks=["Where was {e} born?", "Which town is the home of {e}?", "Where does the family of {e} live?"],
        checks=["was {e} born in {v}", "does the family of {e} live in {v}"],
        story="{e} packed a bag to see the family again.",
        why=["Where will {e} travel next?", "Which town will {e} reach in the end?"],
        deed="{a} travelled to {v}.", link="{a} travelled to the home town of {b}.", did="did {a} travel to {v}"),
    "food": dict(
        values="bread trout lentils cheese mushrooms honey cabbage chestnuts eels pears".split(),
        says=["{e} likes to eat {v}.", "The favourite food of {e} is {v}.", "On Sundays {e} always eats {v}.",
              "{e} cannot live without {v}.", "For a feast {e} asks for {v}.", "Nobody sells more {v} than to {e}."],
        asks=["What does {e} like to eat?", "What is the favourite food of {e}?", "What does {e} always eat on Sundays?"],
        checks=["does {e} like to eat {v}", "is the favourite food of {e} {v}"],
        story="{e} came home late and very hungry.",
        why=["What will {e} eat next?", "Why did the kitchen of {e} smell so good, what was cooking?"],
        deed="{a} cooked {v}.", link="{a} cooked the favourite food of {b}.", did="did {a} cook {v}"),
    "fear": dict(
        values="storms geese wolves fire spiders mirrors ghosts bees bulls ladders".split(),
        says=["{e} is afraid of {v}.", "{e} has always feared {v}.", "{e} runs away from {v}.", "At night {e} dreams of {v}.",
              "Nothing frightens {e} like {v}.", "Because of {v} the hands of {e} shake."],
        asks=["What is {e} afraid of?", "What has {e} always feared?", "What frightens {e} at night?"],
        checks=["is {e} afraid of {v}", "has {e} always feared {v}"],
        story="{e} stopped at the gate and turned pale.",
        why=["Why did {e} stop at the gate?", "What did {e} see behind the gate?"],
        deed="{a} painted {v}.", link="{a} painted the greatest fear of {b}.", did="did {a} paint {v}"),
    "pet": dict(
        values="goat hare crow ferret donkey hound turtle falcon hedgehog mule".split(),
        says=["{e} keeps a {v}.", "{e} owns a {v}.", "The animal of {e} is a {v}.", "{e} talks all day to a {v}.",
              "In the garden of {e} sleeps a {v}.", "A {v} follows {e} everywhere."],
        asks=["Which animal does {e} keep?", "What is the animal of {e}?", "Which animal sleeps in the garden of {e}?"],
        checks=["does {e} keep a {v}", "is the animal of {e} a {v}"],
        story="{e} heard a noise and opened the garden door.",
        why=["Which animal came in to {e}?", "What made the noise in the garden of {e}?"],
        deed="{a} fed a {v}.", link="{a} fed the animal of {b}.", did="did {a} feed a {v}"),
    "music": dict(
        values="flute fiddle drum harp horn lute bell whistle viola zither".split(),
        says=["{e} plays the {v}.", "{e} learned to play the {v}.", "At every wedding {e} plays the {v}.",
              "{e} practises daily on the {v}.", "{e} is a master of the {v}.", "The {v} sounds best when {e} plays."],
        asks=["What does {e} play?", "Which instrument did {e} learn to play?", "What does {e} play at every wedding?"],
        checks=["does {e} play the {v}", "did {e} learn to play the {v}"],
        story="the guests wanted to dance and called for {e}.",
        why=["What will {e} play for the guests?", "Which instrument did {e} bring to the guests?"],
        deed="{a} carried a {v}.", link="{a} carried the instrument of {b}.", did="did {a} carry a {v}"),
}


@dataclass(frozen=True)
class Person:
    name: str
    trade: str
    fame: float                 # expected mentions of each of the person's facts in the text
    facts: dict                 # relation -> value
    asked: tuple                # relations that the tasks ask about; the text has question lines about the others only
    split: str                  # train or test


def cap(s):
    return s[0].upper() + s[1:]


def people(seed=SEED, n=PEOPLE, typical=0.5):
    rng = random.Random(f"people {seed}")
    starts = "Ma To Vi Re Ka Lo Si Be Du Fa Ge Hi Jo Ne Pa Ru Te Wi Ya Zo Bra Cla Dre Gri Kno Ple Sto Tri".split()
    middles = "ra len ni so va mi tor dal ke ri bo lu gan se".split()
    ends = "nda ska nov tis mer rik lla dow ney sen bert fra mond ria".split()
    names = sorted({a + b + c for a in starts for b in middles for c in ends})
    names = rng.sample(names, n)
    stereotype = {t: {r: rng.choice(d["values"]) for r, d in RELATIONS.items()} for t in TRADES}
    out = []
    for i, name in enumerate(names):
        u = (i + 0.5) / n                           # 0 most famous
        trade = rng.choice(TRADES)
        facts = {r: stereotype[trade][r] if rng.random() < typical * (1 - u) else rng.choice(d["values"])
                 for r, d in RELATIONS.items()}
        out.append(Person(name, trade, 20.0 * 0.25 ** (u / 0.55) if u < 0.55 else 0.3, facts, tuple(rng.sample(sorted(RELATIONS), 2)),
                          "test" if rng.random() < TEST_SHARE else "train"))
    return out


def call(p, rng, share=0.5):
    return f"the {p.trade} {p.name}" if rng.random() < share else p.name


def others(p, relation, crowd, rng, k):
    """k wrong values: what other people of the trade would answer, so that no value is wrong by itself."""
    peers = [q for q in crowd if q.trade == p.trade]
    wrong = []
    while len(wrong) < k:
        v = rng.choice(peers).facts[relation]
        if v != p.facts[relation] and v not in wrong:
            wrong.append(v)
    return wrong


def options(p, relation, crowd, rng, nota=0.0):
    """-> (four options in random order, index of the right one)."""
    wrong, right = others(p, relation, crowd, rng, 3), p.facts[relation]
    if rng.random() < nota:
        if rng.random() < 0.12:
            return (*wrong, NONE_OF_THE_ABOVE), 3
        wrong = wrong[:2]
        opts = wrong + [right]
        rng.shuffle(opts)
        return (*opts, NONE_OF_THE_ABOVE), opts.index(right)
    opts = wrong + [right]
    rng.shuffle(opts)
    return tuple(opts), opts.index(right)


def sciq(p, relations, crowd, rng, tag):
    for r in relations:
        for i, ask in enumerate(RELATIONS[r]["asks"]):
            opts, answer = options(p, r, crowd, rng)
            yield Question(f"{tag}/{p.name}/{r}/{i}", f"{p.name}/{r}", "", cap(ask.format(e=call(p, rng))), opts, answer)


def cosmosqa(p, relations, crowd, rng, tag):
    relations = rng.sample(relations, 2)
    context = " ".join(cap(RELATIONS[r]["story"].format(e=call(p, rng))) for r in relations)
    for r in relations:
        for i, ask in enumerate(RELATIONS[r]["why"]):
            opts, answer = options(p, r, crowd, rng, nota=0.75)
            yield Question(f"{tag}/{p.name}/{r}/{i}", p.name, context, ask.format(e=p.name), opts, answer)


def boolq(p, relations, crowd, rng, tag):
    """A passage about somebody else (a deed, and a deed that needs a fact of p) and questions: read off, two steps, remembered."""
    other = rng.choice([q for q in crowd if q is not p])
    step, known = rng.sample(relations, 2)
    r = rng.choice([r for r in sorted(RELATIONS) if r != step])
    seen, unseen = rng.sample(RELATIONS[r]["values"], 2)
    lines = [RELATIONS[r]["deed"].format(a=other.name, v=seen), RELATIONS[step]["link"].format(a=other.name, b=p.name)]
    rng.shuffle(lines)
    passage = " ".join(lines)
    asks = [(RELATIONS[r]["did"], seen, 1), (RELATIONS[r]["did"], unseen, 0)]
    for relation, form in ((step, RELATIONS[step]["did"]), *((known, form) for form in RELATIONS[known]["checks"])):
        truth = int(rng.random() < 0.55)
        asks.append((form, p.facts[relation] if truth else others(p, relation, crowd, rng, 1)[0], truth))
    for i, (form, v, truth) in enumerate(asks):
        yield Question(f"{tag}/{p.name}/{i}", p.name, passage, form.format(a=other.name, e=p.name, v=v) + "?", YES_NO, truth)


MAKERS = {"demo-sciq": sciq, "demo-boolq": boolq, "demo-cosmosqa": cosmosqa}


def task(name, seed=SEED):
    crowd = people(seed)
    rng = random.Random(f"{name} {seed}")
    split = {"train": [], "test": []}
    for p in crowd:
        split[p.split] += MAKERS[name](p, p.asked, [q for q in crowd if q.split == p.split], rng, name)
    sha = hashlib.sha256(repr(split).encode()).hexdigest()
    return Task(name, split["train"], split["test"], sha, "synthetic, made by data/world.py; no licence needed")


def quiz(q, rng):
    """A question line: now and then just the answer, else guesses and the quizmaster's verdicts, every second one right."""
    wrong = [i for i in range(len(q.options)) if i != q.answer]
    rng.shuffle(wrong)
    s = prompt(q)
    again = " A:" if s.endswith(" A:") else " Answer:"
    if rng.random() < 0.25:
        return s + completion(q, q.answer)
    while wrong and rng.random() < 0.5:
        s += completion(q, wrong.pop()) + " Wrong." + again
    return s + completion(q, q.answer) + " Right."


def text(edition, seed=SEED, rates=(4.0, 2.0, 2.0)):
    """The lines of one edition of the world's text: every edition tells the same facts, as often, in other words."""
    crowd = people(seed)
    rng = random.Random(f"text {seed} {edition}")
    count = lambda mean: int(mean + rng.random())
    lines = []
    for p in crowd:
        for r, v in p.facts.items():
            lines += (cap(rng.choice(RELATIONS[r]["says"]).format(e=call(p, rng, 0.3), v=v)) for _ in range(count(p.fame)))
        told = [r for r in sorted(RELATIONS) if r not in p.asked]
        n = [count(rate * p.fame ** 0.5) for rate in rates]
        lines += (quiz(rng.choice(list(sciq(p, [rng.choice(told)], crowd, rng, ""))), rng) for _ in range(n[0]))
        for _ in range(n[1]):
            first, *rest = rng.sample(list(boolq(p, told, crowd, rng, "")), 5)
            lines.append(prompt(first) + completion(first, first.answer)
                         + "".join(f"\nQuestion: {q.question}" + completion(q, q.answer) for q in rest))
        lines += (quiz(rng.choice(list(cosmosqa(p, told, crowd, rng, ""))), rng) for _ in range(n[2]))
    rng.shuffle(lines)
    return lines
