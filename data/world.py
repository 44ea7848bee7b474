"""The demo world: made-up people and facts, and three tasks that ask about them.

Everything here is synthetic, and made so that the method can be watched on two CPU cores in a minute: how
often a fact is told in the text that the demo's two models were pretrained on (tests/make_demo.py) decides
which of them knows it. It is no evidence for the paper's numbers.

    person     name, trade, fame, one fact per relation, and the split (train or test) that asks about it
    fame       how often an edition of the text states each of the person's facts: a slope, then a tail
    told       three relations per person about which the text has question lines, in all three formats
    asked      the other two, which the tasks ask about: the text states them and gossips about them, no more

    demo-sciq       closed book; a fact is asked in three wordings, which are one group
    demo-boolq      a passage and yes/no questions: two to read off, one that needs a fact too, two a fact
    demo-cosmosqa   a story and what-next or why questions; "None of the above" is often there, seldom right

Wrong options are what others of the trade would answer, so no value and no pair of trade and value is wrong
by itself. A trade's stereotypes come from its famous people; the others do not follow them.
"""
import hashlib
import random
from collections.abc import Iterator
from typing import NamedTuple

from data import NONE_OF_THE_ABOVE, YES_NO, Question, Task

PEOPLE, FAMOUS, TEST_SHARE, SEED = 320, 0.65, 0.375, 7
TRADES = "baker sailor miller shepherd tailor smith".split()
SYLLABLES = ("Ma To Vi Re Ka Lo Si Be Du Fa Ge Hi Jo Ne Pa Ru Te Wi Ya Zo "
             "Bra Cla Dre Gri Kno Ple Sto Tri".split(),
             "ra len ni so va mi tor dal ke ri bo lu gan se".split(),
             "nda ska nov tis mer rik lla dow ney sen bert fra mond ria".split())
# Of each relation: values; says: statements; asks: questions; checks: yes/no questions; story and why: what
# leads up to the fact, and questions that it answers; deed, link, did: somebody else's deed, with a value of
# its own or with this person's (two steps), and the question about it. {e}, {b}: the person; {a}: somebody
# else; {v}: a value.
RELATIONS = {
    "home": dict(
        values="Arvik Belmont Corra Dunmere Eskil Farrow Gralin Hestad Ivrea Jutvik".split(),
        says=["{e} was born in {v}.", "{e} grew up in {v}.", "{e} is at home in {v}.",
              "The family of {e} lives in {v}.", "Every summer {e} goes back to {v}.",
              "In {v} everybody knows {e}."],
        asks=["Where was {e} born?", "Which town is the home of {e}?", "Where does the family of {e} live?"],
        checks=["was {e} born in {v}", "does the family of {e} live in {v}"],
        story="{e} packed a bag to see the family again.",
        why=["Where will {e} travel next?", "Which town will {e} reach in the end?"],
        deed="{a} travelled to {v}.", link="{a} travelled to the home town of {b}.",
        did="did {a} travel to {v}"),
    "food": dict(
        values="bread trout lentils cheese mushrooms honey cabbage chestnuts eels pears".split(),
        says=["{e} likes to eat {v}.", "The favourite food of {e} is {v}.", "On Sundays {e} always eats {v}.",
              "{e} cannot live without {v}.", "For a feast {e} asks for {v}.",
              "Nobody sells more {v} than to {e}."],
        asks=["What does {e} like to eat?", "What is the favourite food of {e}?",
              "What does {e} always eat on Sundays?"],
        checks=["does {e} like to eat {v}", "is the favourite food of {e} {v}"],
        story="{e} came home late and very hungry.",
        why=["What will {e} eat next?", "Why did the kitchen of {e} smell so good, what was cooking?"],
        deed="{a} cooked {v}.", link="{a} cooked the favourite food of {b}.", did="did {a} cook {v}"),
    "fear": dict(
        values="storms geese wolves fire spiders mirrors ghosts bees bulls ladders".split(),
        says=["{e} is afraid of {v}.", "{e} has always feared {v}.", "{e} runs away from {v}.",
              "At night {e} dreams of {v}.", "Nothing frightens {e} like {v}.",
              "Because of {v} the hands of {e} shake."],
        asks=["What is {e} afraid of?", "What has {e} always feared?", "What frightens {e} at night?"],
        checks=["is {e} afraid of {v}", "has {e} always feared {v}"],
        story="{e} stopped at the gate and turned pale.",
        why=["Why did {e} stop at the gate?", "What did {e} see behind the gate?"],
        deed="{a} painted {v}.", link="{a} painted the greatest fear of {b}.", did="did {a} paint {v}"),
    "animal": dict(
        values=["a " + v for v in "goat hare crow ferret donkey hound turtle falcon hedgehog mule".split()],
        says=["{e} keeps {v}.", "{e} owns {v}.", "The animal of {e} is {v}.", "{e} talks all day to {v}.",
              "In the garden of {e} sleeps {v}.", "{v} follows {e} everywhere."],
        asks=["Which animal does {e} keep?", "What is the animal of {e}?",
              "Which animal sleeps in the garden of {e}?"],
        checks=["does {e} keep {v}", "is the animal of {e} {v}"],
        story="{e} heard a noise and opened the garden door.",
        why=["Which animal came in to {e}?", "What made the noise in the garden of {e}?"],
        deed="{a} fed {v}.", link="{a} fed the animal of {b}.", did="did {a} feed {v}"),
    "music": dict(
        values=["the " + v for v in "flute fiddle drum harp horn lute bell whistle viola zither".split()],
        says=["{e} plays {v}.", "{e} learned to play {v}.", "At every wedding {e} plays {v}.",
              "{e} practises daily on {v}.", "{e} is a master of {v}.", "{v} sounds best when {e} plays."],
        asks=["What does {e} play?", "Which instrument did {e} learn to play?",
              "What does {e} play at every wedding?"],
        checks=["does {e} play {v}", "did {e} learn to play {v}"],
        story="the guests wanted to dance and called for {e}.",
        why=["What will {e} play for the guests?", "Which instrument did {e} bring to the guests?"],
        deed="{a} carried {v}.", link="{a} carried the instrument of {b}.", did="did {a} carry {v}"),
}


class Person(NamedTuple):
    name: str
    trade: str
    fame: float                 # how often an edition of the text states each of the facts, on average
    facts: dict[str, str]       # relation -> value
    asked: list[str]            # relations the tasks ask about
    told: list[str]             # relations the text has question lines about
    split: str                  # train or test


def people() -> list[Person]:
    """Everybody, the most famous first."""
    rng = random.Random(f"people {SEED}")
    every = [a + b + c for a in SYLLABLES[0] for b in SYLLABLES[1] for c in SYLLABLES[2]]
    stereotype = {(t, r): rng.choice(relation["values"]) for t in TRADES for r, relation in RELATIONS.items()}
    crowd = []
    for i, name in enumerate(rng.sample(every, PEOPLE)):
        rank, trade, relations = i / PEOPLE, rng.choice(TRADES), rng.sample(sorted(RELATIONS), len(RELATIONS))
        follows = 0.5 if rank < FAMOUS else 0.0
        facts = {r: stereotype[trade, r] if rng.random() < follows else rng.choice(RELATIONS[r]["values"])
                 for r in sorted(RELATIONS)}
        fame = 20.0 * 0.25 ** (rank / FAMOUS) if rank < FAMOUS else 0.3
        split = "test" if rng.random() < TEST_SHARE else "train"
        crowd.append(Person(name, trade, fame, facts, relations[:2], relations[2:], split))
    return crowd


def call(p: Person, rng, with_trade: float) -> str:
    return f"the {p.trade} {p.name}" if rng.random() < with_trade else p.name


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def wrong_values(p: Person, relation: str, crowd, rng, n: int) -> list[str]:
    """n different values that others of the trade would answer with."""
    values = [q.facts[relation] for q in crowd if q.trade == p.trade]
    values = [v for v in values if v != p.facts[relation]]
    rng.shuffle(values)
    return list(dict.fromkeys(values))[:n]


def options(p: Person, relation: str, crowd, rng, none: float = 0.0) -> tuple[tuple[str, ...], int]:
    """Four options, with probability `none` one is "None of the above", and the index of the right one."""
    right, wrong = p.facts[relation], wrong_values(p, relation, crowd, rng, 3)
    answers = [right, *wrong]
    if rng.random() < none:
        out = rng.random() < 0.12
        answers = [NONE_OF_THE_ABOVE, *wrong] if out else [right, NONE_OF_THE_ABOVE, *wrong[:2]]
    shown = rng.sample(answers, 4)
    return tuple(shown), shown.index(answers[0])


def sciq(p: Person, relations: list[str], crowd, rng) -> Iterator[Question]:
    for r in relations:
        for i, ask in enumerate(RELATIONS[r]["asks"]):
            yield Question(f"{p.name}-{r}-{i}", f"{p.name}-{r}", "", ask.format(e=call(p, rng, 0.5)),
                           *options(p, r, crowd, rng))


def cosmosqa(p: Person, relations: list[str], crowd, rng) -> Iterator[Question]:
    relations = rng.sample(relations, 2)
    context = " ".join(capital(RELATIONS[r]["story"].format(e=call(p, rng, 0.5))) for r in relations)
    for r in relations:
        for i, why in enumerate(RELATIONS[r]["why"]):
            yield Question(f"{p.name}-{r}-{i}", p.name, context, why.format(e=p.name),
                           *options(p, r, crowd, rng, none=0.75))


def boolq(p: Person, relations: list[str], crowd, rng) -> Iterator[Question]:
    other = rng.choice([q for q in crowd if q is not p])
    step, known = rng.sample(relations, 2)
    read = rng.choice([r for r in sorted(RELATIONS) if r != step])
    seen, unseen = rng.sample(RELATIONS[read]["values"], 2)
    passage = [RELATIONS[read]["deed"].format(a=other.name, v=seen),
               RELATIONS[step]["link"].format(a=other.name, b=p.name)]
    asks = [(RELATIONS[read]["did"], seen, 1), (RELATIONS[read]["did"], unseen, 0)]
    for r, form in ((step, RELATIONS[step]["did"]), *((known, form) for form in RELATIONS[known]["checks"])):
        truth = int(rng.random() < 0.55)
        asks.append((form, p.facts[r] if truth else wrong_values(p, r, crowd, rng, 1)[0], truth))
    passage = " ".join(rng.sample(passage, 2))
    for i, (form, v, truth) in enumerate(asks):
        ask = form.format(a=other.name, e=p.name, v=v) + "?"
        yield Question(f"{p.name}-{i}", p.name, passage, ask, YES_NO, truth)


MAKERS = {"demo-sciq": sciq, "demo-boolq": boolq, "demo-cosmosqa": cosmosqa}


def task(name: str) -> Task:
    """demo-sciq, demo-boolq or demo-cosmosqa; the same in every process."""
    crowd, rng, splits = people(), random.Random(f"{name} {SEED}"), {"train": [], "test": []}
    for p in crowd:
        splits[p.split] += MAKERS[name](p, p.asked, crowd, rng)
    sha256 = hashlib.sha256(repr(splits).encode()).hexdigest()
    return Task(name, splits["train"], splits["test"], sha256, "synthetic: data/world.py")
