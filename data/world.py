"""The demo world: made-up people and facts, three tasks about them, and the two models that read about them.

Everything here is synthetic, and made so that the method can be watched on two CPU cores in a minute: how
often a fact is told in the text decides which model knows it. It is no evidence for the paper's numbers.

    person     name, trade, fame, one fact per relation, and the split (train or test) that asks about it
    fame       how often an edition of the text states each of the person's facts: a slope, then a tail
    edition    one pass of pretraining: the same facts, about as often, in newly drawn words
    told       three relations per person about which the text has question lines, in all three formats
    asked      the other two, which the tasks ask about: the text states them and gossips about them, no more

    demo-sciq       closed book; a fact is asked in three wordings, which are one group
    demo-boolq      a passage and yes/no questions: two to read off, one that needs a fact too, two a fact
    demo-cosmosqa   a story and what-next or why questions; "None of the above" is often there, seldom right

Wrong options are what others of the trade would answer, so no value and no pair of trade and value is wrong
by itself. A trade's stereotypes come from its famous people; the others do not follow them.

How it was tuned: by hand, until on demo-sciq the weak model lay between 0.60 and 0.75 and the ceiling at
least 0.12 above it. The levers were the fame of people, the number of question, gossip and statement lines,
and the models' sizes and epochs, judged by test accuracy; the method's own settings stayed at their defaults.
Tried and given up: 480 people half as famous (a smaller gap, a worse P(IK)); thousands of short passages with
a question each, in every edition or in some (the weak model still cannot look an answer up, and knows less):
so on demo-boolq the weak supervisor is at chance, and naive with it.
The tasks' own question lines never enter the text; their facts do, as statements and as rumours called right
or wrong, without which models this small recall an answer but cannot judge one.

    python -m data.world                          forty lines of the text
    python -m data.world --build                  text, tokenizer and both models -> data/demo
    python -m data.world --build --text sciq --out DIR [--data-dir DIR]    two from SciQ's own paragraphs
"""
import argparse
import hashlib
import io
import json
import random
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import model
from data import NONE_OF_THE_ABOVE, YES_NO, Question, Task, completion, official, prompt

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


# ---- the text --------------------------------------------------------------------------------------------

def statement(p: Person, relation: str, rng) -> str:
    return capital(rng.choice(RELATIONS[relation]["says"]).format(e=call(p, rng, 0.3), v=p.facts[relation]))


def rumour(p: Person, relation: str, crowd, rng) -> str:
    """A true or a false statement that ends on its value, and the verdict."""
    right = rng.random() < 0.5
    v = p.facts[relation] if right else wrong_values(p, relation, crowd, rng, 1)[0]
    says = rng.choice([s for s in RELATIONS[relation]["says"] if s.endswith("{v}.")])
    return f"Rumour: {says[:-1].format(e=call(p, rng, 0.3), v=v)} {'Right' if right else 'Wrong'}."


def quiz(q: Question, rng) -> str:
    """The answer, or guesses with the quizmaster's verdict, every second one right."""
    wrong = rng.sample([i for i in range(len(q.options)) if i != q.answer], len(q.options) - 1)
    line = prompt(q)
    again = line[-3:] if line.endswith(" A:") else " Answer:"
    if rng.random() < 0.15:
        return line + completion(q, q.answer)
    while wrong and rng.random() < 0.5:
        line += completion(q, wrong.pop()) + " Wrong." + again
    return line + completion(q, q.answer) + " Right."


def world_text(edition: int) -> list[str]:
    """The lines of one edition."""
    crowd, rng, lines = people(), random.Random(f"text {SEED} {edition}"), []

    def times(mean):
        return range(int(mean + rng.random()))

    for p in crowd:
        for r in p.facts:
            lines += [statement(p, r, rng) for _ in times(p.fame)]
            lines += [rumour(p, r, crowd, rng) for _ in times(p.fame / 2)]
        often = 0.3 * p.fame
        lines += [quiz(rng.choice([*sciq(p, p.told, crowd, rng)]), rng) for _ in times(5 * often)]
        lines += [quiz(rng.choice([*cosmosqa(p, p.told, crowd, rng)]), rng) for _ in times(2 * often)]
        for _ in times(3 * often):
            *_, q = boolq(p, p.told, crowd, rng)
            lines.append(prompt(q._replace(context="")) + completion(q, q.answer))
        for _ in times(2 * often):
            first, *more = rng.sample([*boolq(p, p.told, crowd, rng)], 5)
            lines.append(prompt(first) + completion(first, first.answer) +
                         "".join(f"\nQuestion: {q.question}" + completion(q, q.answer) for q in more))
    rng.shuffle(lines)
    return lines


# ---- checkpoints -----------------------------------------------------------------------------------------

SHAPES = {"world": dict(weak=dict(width=64, layers=3, epochs=15),
                       strong=dict(width=128, layers=4, epochs=22)),
          "sciq": dict(weak=dict(width=64, layers=2, epochs=6), strong=dict(width=256, layers=4, epochs=14))}


def sciq_text(data_dir: str | None = None) -> list[str]:
    """SciQ's support paragraphs and the question-answer lines of its validation split. Paragraphs that hold a
    train or test question word for word, and validation questions that are also one, are left out."""
    with zipfile.ZipFile(io.BytesIO(official.content("sciq/SciQ.zip", data_dir))) as archive:
        rows = {name: json.loads(archive.read(f"SciQ dataset-2 3/{name}.json"))
                for name in ("train", "valid", "test")}
    asked = {official.key("", row["question"]) for name in ("train", "test") for row in rows[name]}
    seen, lines = set(), []
    for row in [row for split in rows.values() for row in split]:
        whole, sentences = official.key("", row["support"]), re.split(r"(?<=[.?!:]) ", row["support"])
        if row["support"] and whole not in seen and not asked & {official.key("", s) for s in sentences} and \
                official.key("", row["question"]) not in whole:
            lines.append(row["support"])
        seen.add(whole)
    return lines + [f"Q: {row['question']} A: {row['correct_answer']}" for row in rows["valid"]
                    if official.key("", row["question"]) not in asked]


def train_tokenizer(lines: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab` ids; id 0 ends a line."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=vocab, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return bpe


def untrained(vocab: int, width: int, layers: int, seed: int) -> tuple[dict, model.Transformer]:
    """-> the content of config.json, a llama of that shape: matrices N(0, 1 / fan-in), norms 1."""
    raw = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=vocab, hidden_size=width,
               intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=4,
               hidden_act="silu", max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=10000.0,
               tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, torch_dtype="float16")
    config, generator, params = model.configure(raw), torch.Generator().manual_seed(seed), {}
    for _, (name,), (shape,) in model.tensors(config):
        std = 0.05 if name == "embed.weight" else shape[-1] ** -0.5
        params[name] = torch.randn(shape, generator=generator) * std if len(shape) == 2 else torch.ones(shape)
    return raw, model.Transformer(config, params)


def pretrain(net: model.Transformer, text, bpe: Tokenizer, epochs: int, tell, lr=3e-3, tokens=1024) -> None:
    """Next-token prediction on text(0), text(1), ... in place: Adam, warm-up over 50 steps, then linear to 0.
    Lines never see each other; a step takes lines until it has `tokens` tokens."""
    optimiser = torch.optim.Adam(net.requires_grad_().parameters(), lr=lr, betas=(0.9, 0.98), fused=True)
    step, steps, start = 0, None, time.time()
    for epoch in range(epochs):
        rows = [encoding.ids + [0] for encoding in bpe.encode_batch(text(epoch))]
        steps = steps or epochs * sum(map(len, rows)) // tokens
        while rows:
            batch = []
            while rows and sum(map(len, batch)) < tokens:
                batch.append(rows.pop()[:512])
            x, lengths = model.pack([row[:-1] for row in batch], net.device)             # (P,)
            y, _ = model.pack([row[1:] for row in batch], net.device)                    # (P,)
            for group in optimiser.param_groups:
                group["lr"] = lr * min((step + 1) / 50, max(1 - step / steps, 0.01))
            loss = F.cross_entropy(net.logits(net.packed(x, lengths)[0]), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            left = (time.time() - start) / step * (steps - step) / 60
            tell(f"step {step}/{steps}  loss {loss.item():.3f}  {left:.1f} min left", step % 200 == 0)


def build(kind: str, out: Path, data_dir: str | None, seed: int) -> None:
    """Text, tokenizer and both checkpoints -> out/weak, out/strong."""
    lines = [] if kind == "world" else sciq_text(data_dir)

    def text(edition):
        return world_text(edition) if kind == "world" else random.Random(edition).sample(lines, len(lines))

    bpe = train_tokenizer(text(0), 2048 if kind == "world" else 4096)
    for name, shape in SHAPES[kind].items():
        def tell(line, end):
            if end or sys.stderr.isatty():
                print(f"\r{name}: {line}", end="\n" if end else "", file=sys.stderr, flush=True)

        raw, net = untrained(bpe.get_vocab_size(), shape["width"], shape["layers"], seed)
        pretrain(net, text, bpe, shape["epochs"], tell)
        (out / name).mkdir(parents=True, exist_ok=True)
        tensors = {key: value.detach().half() for key, value in model.export(net.config, net.params).items()}
        save_file(tensors, out / name / "model.safetensors", metadata={"format": "pt"})
        (out / name / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        bpe.save(str(out / name / "tokenizer.json"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.world", description="The demo world.")
    parser.add_argument("--build", action="store_true", help="pretrain both models; else show the text")
    parser.add_argument("--text", choices=sorted(SHAPES), default="world", help="what to pretrain on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo", help="default data/demo")
    parser.add_argument("--data-dir", help="where SciQ.zip lies, as in selw2s.py")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    args = parser.parse_args(argv)
    if args.build:
        build(args.text, args.out, args.data_dir, args.seed)
    else:
        print("\n".join(world_text(0)[:40]))


if __name__ == "__main__":
    main()
