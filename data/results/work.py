"""The work of a run in floating-point operations, known from shapes before it is done: progress measures it.

A token costs 2 operations per weight of the layers forward, and in finetuning 2 more by activations and 2
by weights. All else in a layer (norms, softmax, launching it) counts as BESIDE, which only small models
notice. Logits cost 2 per weight of the head, for the tokens that are scored: none for a classifier.
"""
from collections.abc import Sequence
from typing import NamedTuple

from data import YES_NO, Question, completion, distinct, prompt
from data.tokens import encode_options

BESIDE = 1e5    # operations per token and layer; fits the demo's two models on CPU cores


class Size(NamedTuple):
    """Of a list of texts; floats where it is estimated."""
    tokens: float
    scored: float       # tokens whose logits are taken

    def times(self, n: float) -> "Size":
        return Size(self.tokens * n, self.scored * n)


def size_of(heads: Sequence[list], tails: Sequence[list[list]]) -> Size:
    """Of prompts with all their options; the end of a prompt is scored once for all of them."""
    tokens = sum(len(head) + sum(map(len, tail)) for head, tail in zip(heads, tails))
    return Size(tokens, sum(1 + sum(len(option) - 1 for option in tail) for tail in tails))


def reading(network, size: Size) -> float:
    """Operations of a pass forward; network: model.Transformer."""
    c = network.config
    weights = sum(x.numel() for name, x in network.params.items() if name.startswith("layers."))
    return (2 * weights + BESIDE * c.layers) * size.tokens + 2 * c.vocab * c.width * size.scored


def finetuning(network, size: Size, *, tune: str, epochs: int, checkpoint: bool) -> float:
    """Operations of training on texts of this size.

    full: 6 a weight and token; lora: 4, its own matrices left out; head: one pass forward in all, as its
    features are kept. checkpoint, and always the logits of a student that answers: forward twice."""
    if tune == "head":
        return reading(network, size)
    passes = {"full": 3, "lora": 2}[tune] + checkpoint
    return epochs * (passes * reading(network, size._replace(scored=0))
                     + 3 * reading(network, Size(0, size.scored)))


class StageWork(NamedTuple):
    """Of one finetune stage, in operations; tokens: of all epochs of training."""
    training: float
    predicting: list[float]     # per list of inputs asked for
    tokens: float


def stage_work(network, inputs: list, ask: list, settings: dict) -> StageWork:
    """inputs, ask: token sequences or model.Choices, as selw2s.finetuned takes them; settings of finetune."""
    sizes = []
    for part in (inputs, *ask):
        if isinstance(part[0], list):
            sizes.append(Size(sum(map(len, part)), 0))
        else:
            sizes.append(size_of([x.prompt for x in part], [x.options for x in part]))
    how = {key: settings[key] for key in ("tune", "epochs", "checkpoint")}
    return StageWork(finetuning(network, sizes[0], **how), [reading(network, size) for size in sizes[1:]],
                     settings["epochs"] * sizes[0].tokens)


def mean_sizes(tokenizer, questions: list[Question]) -> tuple[Size, Size]:
    """Mean size of a question's item, and of the question with all options; from about 200 of them."""
    some = questions[::max(1, len(questions) // 200)]
    options = [[completion(q, i) for i in distinct(q.options)] for q in some]
    heads, tails = encode_options(tokenizer, [prompt(q) for q in some], options)
    item = sum(len(head) + (0 if q.options == YES_NO else sum(map(len, tail)) / len(tail))
               for q, head, tail in zip(some, heads, tails))
    return Size(item / len(some), 0), size_of(heads, tails).times(1 / len(some))


EXTRA = {       # students that an analysis trains per seed beside those of --methods
    "cross-task": {"selective": 9}, "difficulty": {"selective": 3},
    "sweep": {"route-only": 9, "graph-only": 19}, "representation": {"ceiling": 1, "naive": 1}, "": {}}


def ahead(setup) -> dict[str, tuple[str, float, int]]:
    """{stage: (kind, operations, times)} of a run; setup: selw2s.Setup. Not foreseen: what cross-task
    prepares of other tasks, debate's supervisors, and the naive student of chain where naive is not among the
    methods."""
    config, seeds, strong = setup.config, len(setup.config.seeds), setup.strong
    n_half, n_test = len(setup.task.train) / 2, len(setup.task.test)
    parts = (setup.task.train, setup.task.test)
    (s_train, q_train), (s_test, q_test) = (mean_sizes(strong.tokenizer, part) for part in parts)
    if config.student == "answer":
        s_train, s_test = q_train, q_test
    settings = dict(tune=config.tune, epochs=config.epochs)

    def trained(model, item, test, learn, asked):
        return (finetuning(model.network, item.times(learn), checkpoint=model.large, **settings)
                + reading(model.network, item.times(asked)) + reading(model.network, test))
    out, one, none = {}, 1 / config.folds, Size(0, 0)
    for i, supervisor in enumerate(setup.supervisors):
        weak = supervisor.model
        (w_train, _), (w_test, _) = (mean_sizes(weak.tokenizer, part) for part in parts)
        work = trained(weak, w_train, w_test.times(n_test), n_half, n_half)
        out[f"weak {i + 1}" if i else "weak"] = ("finetune weak", work, seeds)
        for f in range(config.folds if i == 0 else 0):
            work = trained(weak, w_train, none, n_half * (1 - one), n_half * (1 + one))
            out[f"cross-{f}"] = ("finetune weak", work, seeds)
    for name, q, n in (("labelled", q_train, n_half), ("transfer", q_train, n_half),
                       ("test", q_test, n_test)):
        whole = q._replace(tokens=q.tokens + config.shots * s_train.tokens).times(n)
        once = name == "test" and config.protocol == "paper" and not config.shots   # the same for all seeds
        out[f"read {name}"] = ("read strong", reading(strong.network, whole), 1 if once else seeds)
        if config.own == "judge":       # the item and a sentence, its examples too
            asked = Size((1 + config.shots) * ((s_test if name == "test" else s_train).tokens + 30), 1)
            work = reading(strong.network, asked.times(n))
            out[f"read {name} judge"] = ("read strong", work, 1 if once else seeds)
    student = trained(strong, s_train, s_test.times(n_test), n_half, n_half)
    shorter = trained(strong, s_train, s_test.times(n_test), n_half / 2, n_half)
    for method in set(config.methods) - {"weak", "zero-shot"} | set(EXTRA[config.analysis]):
        times = (method in config.methods) + EXTRA[config.analysis].get(method, 0)
        out[method] = ("finetune strong", shorter if method == "confidence-only" else student, seeds * times)
    if "two-stage" in config.methods:
        out["two-stage first"] = ("finetune strong", shorter, seeds)
    return out
