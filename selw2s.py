"""Selective weak-to-strong generalization: the method (Lang, Huang, Li; AAAI 2026; arXiv 2511.14166).

A weak model labels data. A strong pretrained model answers for itself the questions that it probably knows,
P(IK), takes the weak labels, smoothed over a graph, on the others, and is finetuned on the result. Read
one_seed() and run() first: they take the steps 1 to 8; above them, in the same order, stand the steps. The
command line is in data/config.py, the formats in data/__init__.py, metrics in data/report.py.

symbol      name here  shape         source
D_l         labelled   n_l items     half with ground truth                     Burns et al. 2023, App. A
D_u         transfer   n_u items     half whose truth only metrics, ceiling and oracle read
p_w         weak       (N,)          weak supervisor's P(y = 1), soft           Burns et al. 2023
            own        (N,) 0/1      self-generated label                       paper, abstract
P(IK)       p_ik       (N,)          P(own answer is right | question)          Kadavath et al. 2022
tau         tau        float         own label iff P(IK) >= tau                 [D4]
S, F        graph.py                 smoothing of the weak labels               Zhou et al. 2004
PGR         pgr        float         (student - weak) / (ceiling - weak)        Burns et al. 2023

Shapes: N items (one per question), K options, R hidden-state layers read, C width; float32 unless said,
probes float64. [D..] marks the line that takes a choice which the paper leaves open: the README's table lists
them, with their flags.
"""
from __future__ import annotations

import sys

from data.config import Config, parse, shown

if __name__ == "__main__":  # --help and a wrong flag are answered before torch, seconds away, is imported
    parse()

import hashlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from data import DEMO, YES_NO, DataError, completion, fit, halves, items, load_task, prompt
from data.analyses import analyse
from data.figures import figures
from data.report import accuracy, auroc, brier, cross_entropy, ece, pgr  # noqa: F401
from data.report import rerun, table, write
from data.stages import Stages, counter, digest
from data.tokens import encode_options
from graph import affinity, knn, normalise, propagate
from model import Classifier, LoadError, TrainError, finetune, load, out_of_memory, read

HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------- the two models
class Side(NamedTuple):
    """One of the two pretrained models: network, tokenizer, SHA-256 of its files, learning rate."""
    model: object
    tokenizer: object
    sha256: str
    lr: float
    large: bool         # a billion parameters or more: activations are recomputed in the backward pass


def open_side(source: str, config: Config) -> Side:
    """Load a checkpoint. lr auto: Burns' 1e-5 from a billion parameters, 5e-5 below, 5e-4 below 50M; for
    LoRA, which starts from B = 0, ten times that."""
    model, tokenizer = load(source, device=config.device, dtype=getattr(torch, config.dtype))
    size = sum(p.numel() for p in model.params.values())
    auto = 1e-5 if size >= 1e9 else 5e-5 if size >= 5e7 else 5e-4                                   # [D9]
    auto *= 10 if config.tune == "lora" else 1
    h = hashlib.sha256()
    for file in sorted(model.folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".txt", ".tiktoken"):
            with open(file, "rb") as f:
                h.update(f"{file.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    lr = auto if config.lr == "auto" else float(config.lr)
    return Side(model, tokenizer, h.hexdigest(), lr, size >= 1e9)


def hexed(out: dict[str, Tensor]) -> str:
    return bytes(out["weights"].tolist()).hex()


def trained(name: str, side: Side, sequences, targets: Tensor, ask, config: Config, seed: int, stages: Stages,
            target_fn=None) -> dict[str, Tensor]:
    """Finetune the side's model on sequences, targets (n,): {"p": P(y = 1) (len(ask),), "weights": hash}."""
    settings = dict(lr=side.lr, epochs=config.epochs, batch=config.batch, seed=seed, tune=config.tune,
                    checkpoint=side.large)

    def compute():
        student = finetune(side.model, sequences, targets, target_fn=target_fn, progress=counter(name),
                           **settings)
        state, p = student.state(), student.predict(ask)
        if not p.isfinite().all():
            raise TrainError(f"{name}: its weights are not finite after the last step (learning rate "
                             f"{side.lr}): lower it")
        weights = bytes.fromhex(digest(*(state[key] for key in sorted(state))))
        return {"p": p, "weights": torch.tensor(list(weights), dtype=torch.uint8),
                **({"state." + key: x.cpu() for key, x in state.items()} if kept else {})}
    kept = name == config.keep
    depends = (side.sha256, config.dtype, config.device, settings, sequences, targets, target_fn, ask, kept)
    steps, tokens = -(-len(sequences) // config.batch), sum(map(len, sequences))
    out = stages("finetune", name, depends, compute,
                 steps=config.epochs * steps, tokens=config.epochs * tokens)
    if kept:
        state = {key.removeprefix("state."): x for key, x in out.items() if key.startswith("state.")}
        folder = f"{Path(config.task).stem}-{name}-seed{seed}-{hexed(out)[:8]}"
        Classifier(side.model, state).save(Path(config.out) / "students" / folder)
    return out


# ----------------------------------------------------------------------------------- 1 to 3. Split, weak, own
class Elicited(NamedTuple):
    """What one forward pass of the pretrained strong model over N items' questions says (step 3)."""
    belief: Tensor      # (N, K) own probability of each option (judge: of the labels 0 and 1)
    own: Tensor         # (N,) self-generated label of the item shown, 0/1
    prompt: Tensor      # (N, R, C) hidden states at the question prompt's last token, before any candidate
    item: Tensor        # (N, R, C) hidden states at the item's last token


JUDGE = "\nRespond with 1 if the answer is correct, and with 0 otherwise.\nResponse:"  # after Burns' Table 2


def elicit(config: Config, strong: Side, rows, questions, shots, stages: Stages, tell) -> Elicited:
    """Self-generated labels: the option with the largest log-likelihood given the question is the own answer
    [D1]; the own label of an item is 1 if the candidate it shows is that answer. shots: (item, question) of
    the solved examples in front [D2]."""
    depth = strong.model.config.layers
    layers = tuple(dict.fromkeys((depth // 2, 3 * depth // 4, None)))       # offered to probe and graph [D14]

    def ask(name, prompts, completions, pick):
        heads, tails = encode_options(strong.tokenizer, prompts, completions)
        longest = max(len(h) + max(map(len, t)) for h, t in zip(heads, tails))
        if longest > strong.model.config.context:
            raise DataError(f"a prompt of {longest} tokens is over the strong model's "
                            f"{strong.model.config.context}: use fewer --shots, --own sum, shorter questions")
        return stages("read", name, (strong.sha256, config.dtype, config.device, heads, tails, pick, layers),
                      lambda: read(strong.model, heads, tails, pick, layers=layers)._asdict(),
                      tokens=sum(len(h) + sum(map(len, t)) for h, t in zip(heads, tails)))

    before = "".join(prompt(q) + completion(q, q.answer) + "\n\n" for _, q in shots)
    completions = [[completion(q, i) for i in range(len(q.options))] for q in questions]
    pick = [row.option for row in rows]
    reading = ask("read", [before + prompt(q) for q in questions], completions, pick)
    score = reading["loglik"]                                               # (N, K)
    if config.own == "mean":
        score = score / reading["option_tokens"].clamp_min(1)
    elif config.own == "pmi":
        last = ["Question:" if q.options == YES_NO else prompt(q).split()[-1] for q in questions]
        alone = ask("read unconditional", last, completions, [-1] * len(rows))["loglik"]
        score = score - alone.nan_to_num(neginf=0.0)
    elif config.own == "judge":
        def judged(row, q):     # a yes/no item shows no candidate: "yes" is judged
            return row.text + completion(q, 1) * (row.option < 0) + JUDGE
        before = "".join(f"{judged(row, q)} {row.label}\n\n" for row, q in shots)
        asked = [before + judged(row, q) for row, q in zip(rows, questions)]
        score = ask("read judge", asked, [[" 0", " 1"]] * len(rows), [-1] * len(rows))["loglik"]
        tell(f"3 prompt   {asked[0]!r:.200} + ' 0' or ' 1'")
    if config.own != "judge":
        tell(f"3 prompt   {before + prompt(questions[0])!r:.200} + one of {completions[0]}")
    belief = score.softmax(1)
    shown = torch.tensor([1 if config.own == "judge" or i < 0 else i for i in pick])
    own = (belief.argmax(1) == shown).float()                               # hard: 0 or 1 [D13]
    return Elicited(belief, own, reading["prompt_state"], reading["item_state"])


def answers(config: Config, rows, questions) -> Tensor:
    """The right answer's column of `belief`; for rows beyond D_l it is hidden truth: for metrics only."""
    return torch.tensor([row.label if config.own == "judge" else q.answer for row, q in zip(rows, questions)])


class Prepared(NamedTuple):
    """Steps 1 to 3 of one seed. Rows are items: D_l (n_l), then D_u (n_u), then test. Truth: of D_l only."""
    rows: list          # N items
    questions: list     # N questions; their answers are read for D_l, for the metrics and for nothing else
    n_l: int
    n_u: int
    ids: list           # N token sequences for the strong model
    truth: Tensor       # (n_l,) labels of D_l
    cross: Tensor       # (n_l,) cross-fitted weak P(y = 1)
    half: Tensor        # (n_l,) 0 or 1: the half of D_l the row is in; the other half's model labelled it
    weak: Tensor        # (n_u + test,) weak P(y = 1)
    weak_weights: str   # hash of the weak supervisor
    own: Tensor         # (N,) self-generated label, 0/1
    belief: Tensor      # (N, K) the strong model's probability of each option
    gold: Tensor        # (n_l,) index of the right option
    prompt: Tensor      # (N, R, C) hidden states where the question ends
    item: Tensor        # (N, R, C) hidden states where the item ends
    fold: Tensor        # (n_l,) fold of the item's group
    usable: Tensor      # (n_l,) bool: not of a few-shot example's group, whose answer stood in the prompt

    @property
    def D_u(self) -> slice:
        """Its rows."""
        return slice(self.n_l, self.n_l + self.n_u)


def prepare(config: Config, task, weak: Side, strong: Side, seed: int, stages: Stages, tell) -> Prepared:
    """1. Split and format. 2. Weak supervisor on D_l, soft labels on D_u. 3. Strong model's own answers."""
    question = {q.id: q for q in task.train + task.test}
    drawn = items(task.train, protocol=config.protocol, seed=seed)
    labelled, transfer = halves(drawn, task.train, protocol=config.protocol, seed=seed)
    test = items(task.test, protocol=config.protocol, seed=seed if config.protocol == "openai" else 0)
    rows, n_l, n_u = labelled + transfer + test, len(labelled), len(transfer)
    if config.shots > n_l // 2:
        raise DataError(f"--shots {config.shots} would use up D_l, which has {n_l} items: at most half")
    truth = torch.tensor([float(item.label) for item in labelled])
    texts = [row.text for row in rows]
    tell(f"1 split    {n_l:,} labelled, {n_u:,} transfer, {len(test):,} test items   "
         f"e.g. {texts[0]!r:.70} -> {labelled[0].label}")

    ids = weak.tokenizer.encode(texts)
    supervisor = trained("weak", weak, ids[:n_l], truth, ids[n_l:], config, seed, stages)
    # cross: the only view of weak errors that owns truth
    cross, at = torch.empty(n_l), {item.id: i for i, item in enumerate(labelled)}
    folds = [[at[item.id] for item in part]
             for part in halves(labelled, task.train, protocol="paper", seed=seed)]
    half = torch.zeros(n_l, dtype=torch.int8)
    half[folds[1]] = 1
    for i, (learn, ask) in enumerate((folds, folds[::-1])):
        cross[ask] = trained(f"cross-{i}", weak, [ids[j] for j in learn], truth[learn], [ids[j] for j in ask],
                             config, seed, stages)["p"]
    tell(f"2 weak     cross-fitted accuracy on D_l {accuracy(cross, truth):.3f}")

    picked = np.random.default_rng(seed).choice(n_l, config.shots, replace=False)
    shots = [(labelled[i], question[labelled[i].question_id]) for i in picked]
    asked = [question[row.question_id] for row in rows]
    in_prompt = {q.group for _, q in shots}
    usable = torch.tensor([q.group not in in_prompt for q in asked[:n_l]])
    group = {g: i for i, g in enumerate(dict.fromkeys(q.group for q in asked[:n_l]))}
    fold = torch.tensor([group[q.group] % 5 for q in asked[:n_l]])
    if len(fold[usable].unique()) < 2:
        raise DataError(f"D_l less the groups of --shots {config.shots} examples is too small to cross-fit "
                        "P(IK); give fewer examples, or more questions, in more groups")
    said = elicit(config, strong, rows, asked, shots, stages, tell)
    gold = answers(config, labelled, asked)
    right = (said.belief[:n_l].argmax(1) == gold)[usable].double().mean()
    tell(f"3 own      strong model's own answers right on {right:.3f} of D_l's questions "
         f"(one pass over {len(rows):,} questions)")
    return Prepared(rows, asked, n_l, n_u, strong.tokenizer.encode(texts), truth, cross, half,
                    supervisor["p"], hexed(supervisor), said.own, said.belief, gold, said.prompt, said.item,
                    fold, usable)


# --------------------------------------------------------------------------------------------------- 4. P(IK)
L2_GRID = (10.0, 1.0, 0.3, 0.1, 0.03, 0.01)


class Probe(NamedTuple):
    """A linear probe: P(y = 1 | features) = sigmoid(features @ weight + bias). Fields in float64."""
    weight: Tensor      # (C,)
    bias: Tensor        # ()
    l2: float           # penalty l2/2 |standardised weight|^2 beside the mean cross-entropy
    held_out: Tensor    # (N,) out-of-fold probability of each training row (empty when l2 was given)
    loss: float         # out-of-fold cross-entropy, nats (nan when l2 was given)

    def predict(self, features: Tensor) -> Tensor:
        """features (N, C) -> (N,) probability, float64, where the features are."""
        w, b = self.weight.to(features.device), self.bias.to(features.device)
        return torch.sigmoid(features.double() @ w + b)


def logistic(x: Tensor, y: Tensor, l2: float, w: Tensor, tol: float = 1e-8) -> Tensor:
    """argmin_w of mean CE(sigmoid(x w), y) + l2/2 |w|^2, bias (last entry) unpenalised; gradient norm <= tol.

    x (N, C + 1) float64, last column ones, y (N,) in [0, 1], w (C + 1,) start. Newton's method, each step by
    conjugate gradients: a width of thousands costs matrix-vector products only. Raises if not converged."""
    penalty = torch.full_like(w, l2)
    penalty[-1] = 0

    def loss(w):
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y) + (penalty * w * w).sum() / 2

    for _ in range(200):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y) / len(y) + penalty * w
        size = gradient.norm()
        if size <= tol:
            return w
        curvature = p * (1 - p) / len(y)
        step, r = torch.zeros_like(w), -gradient
        direction, rr = r, r @ r
        for _ in range(10 * len(w)):
            curved = x.T @ (curvature * (x @ direction)) + penalty * direction
            scale = rr / (direction @ curved)
            step, r = step + scale * direction, r - scale * curved
            rr, previous = r @ r, rr
            if rr.sqrt() <= min(0.1, float(size)) * size:
                break
            direction = r + (rr / previous) * direction
        now, length = loss(w), 1.0
        while loss(w + length * step) > now + 1e-12 * now.abs() and length > 1e-6:
            length /= 2
        w = w + length * step
    raise TrainError(f"probe not converged: gradient norm {float(size):.1e} after 200 Newton steps")


def fit_probe(features: Tensor, target: Tensor, *, l2: float | None = None,
              fold: Tensor | None = None) -> Probe:
    """Linear probe: L2 logistic regression to convergence in float64 (paper: P(IK); Kadavath et al. 2022).

    features (N, C), target (N,) in [0, 1]; fold (N,) int: rows that share a fold are held out together
    (groups must not straddle folds; default: five by position). l2=None: chosen of L2_GRID by held-out
    cross-entropy, ties to the larger. Features are standardised inside, with mean and deviation (over N - 1)
    of all rows, held-out ones too: they are not labels; the returned weights apply to raw features."""
    x, y = features.double(), target.double()
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x = torch.cat([(x - mean) / scale, x.new_ones(len(x), 1)], 1)           # (N, C + 1)
    fold = torch.arange(len(x), device=x.device) % 5 if fold is None else fold.to(x.device)
    best, held_out, start = float("nan"), y[:0], x.new_zeros(x.shape[1])
    if l2 is None:
        candidates, warm = {}, {int(f): start for f in fold.unique()}
        for trial in L2_GRID:   # strong to weak: each fit starts from the last
            p = torch.empty_like(y)
            for f, w in warm.items():
                warm[f] = w = logistic(x[fold != f], y[fold != f], trial, w, tol=1e-5)
                p[fold == f] = torch.sigmoid(x[fold == f] @ w)
            candidates[trial] = (cross_entropy(p, y), p)
        l2 = min(candidates, key=lambda trial: candidates[trial][0])
        best, held_out = candidates[l2]
    w = logistic(x, y, l2, start)
    weight = w[:-1] / scale
    return Probe(weight, w[-1] - weight @ mean, l2, held_out, best)


class Known(NamedTuple):
    """Step 4: P(IK) of every row; on D_l out of fold where this probe was trained there."""
    p_ik: Tensor        # (N,)
    layer: int          # which of the R hidden states read
    probe: Probe


def know(config: Config, prep: Prepared, rows: Tensor | None = None) -> Known:
    """4. P(IK): linear probe on the hidden state before any candidate, trained on D_l (or on some rows of
    it); target: own answer right [D3]; layer and L2 by cross-validation on D_l, folds by group."""
    belief = prep.belief[:prep.n_l]
    target = ((belief.argmax(1) == prep.gold).double() if config.target == "hard"
              else belief.gather(1, prep.gold[:, None])[:, 0])
    use = (prep.usable if rows is None else prep.usable & rows).nonzero()[:, 0]
    probes = [fit_probe(x.to(config.device), target[use].to(config.device), fold=prep.fold[use])
              for x in prep.prompt[use].unbind(1)]
    layer = min(range(len(probes)), key=lambda r: probes[r].loss)
    p_ik = probes[layer].predict(prep.prompt[:, layer])
    p_ik[use] = probes[layer].held_out.cpu()
    return Known(p_ik.float(), layer, probes[layer])


# ---------------------------------------------------------------------------------------- 5. Route, 6. Smooth
def route(p_ik: Tensor, self_label: Tensor, weak_label: Tensor, tau) -> tuple[Tensor, Tensor]:
    """The selection (paper, abstract): own label where P(IK) >= tau, weak label elsewhere [D4].

    All (N,); tau a float, compared in p_ik's dtype, or, for a per-item router, (N,). Returns (label (N,),
    is_self (N,) bool)."""
    is_self = p_ik >= tau
    return torch.where(is_self, self_label, weak_label), is_self


def neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k nearest by cosine, features centred: one direction dominates raw hidden states [D15]."""
    x = features.float()
    return knn(x - x.mean(0), min(k, len(x) - 1))


def smoothed(graph, prior: Tensor, alphas, ks, gamma: float) -> dict[tuple[float, int], Tensor]:
    """{(alpha, k): (N,)} from one neighbour list: the k nearest are the first k columns."""
    index, similarity = graph
    Y = torch.stack([1 - prior, prior], 1).to(index.device)                 # (N, 2)
    out = {}
    for k in ks:
        S = normalise(affinity(index[:, :k], similarity[:, :k], gamma=gamma))
        for alpha in alphas:
            result = propagate(S, Y, alpha)
            if result.residual > 1e-5:
                raise TrainError(f"propagation not converged (alpha {alpha}, residual {result.residual:.1e})")
            out[alpha, k] = (result.F[:, 1] / result.F.sum(1)).float().to(prior.device)
    return out


def smooth(features: Tensor, prior: Tensor, alpha: float, k: int, gamma: float) -> Tensor:
    """Smoothed P(y = 1) (N,): F = (1 - alpha)(I - alpha S)^-1 Y on the kNN graph of the items' hidden states.

    features (N, C) hidden states at the item's last token, prior (N,) P(y = 1). alpha = 0: prior itself."""
    if alpha == 0:
        return prior
    return smoothed(neighbours(features, k), prior, (alpha,), (k,), gamma)[alpha, k]


class Smoothing(NamedTuple):
    """What was chosen on D_l, and the label accuracy there before and after."""
    layer: int          # column of the hidden states read
    alpha: float
    k: int
    before: float | None
    after: float | None


def choose_smoothing(features: Tensor, prior: Tensor, truth: Tensor, rows: Tensor, half: Tensor,
                     config: Config) -> Smoothing:
    """alpha, k, layer that make the given rows' labels on D_l most accurate; alpha = 0 unless one does [D6].

    features (N, R, C), prior (N,) with cross-fitted weak labels, truth (N,), rows (N,) bool: the rows that
    would be smoothed; half (N,) int: which model labelled a row. Each half has a graph of its own, as all
    labels of D_u come from one model: to smooth two models' errors into each other flatters smoothing. A
    candidate must beat no smoothing by two standard errors of the paired difference, or smoothing stays off:
    the best of many noisy candidates looks better than it is."""
    parts = [(half == h).nonzero()[:, 0] for h in half.unique()]
    alphas = (0.3, 0.5, 0.7, 0.9, 0.97) if config.alpha == "auto" else (float(config.alpha),)
    least = min(map(len, parts))
    ks = tuple(k for k in (5, 10, 20, 50) if k < max(least, 6)) if config.k == "auto" else (config.k,)
    if rows.sum() < 2 or least < 2:     # nothing to choose by
        return Smoothing(0, 0.0 if config.alpha == "auto" else alphas[0], ks[0], None, None)
    right = ((prior > 0.5) == (truth > 0.5))[rows].double()
    best = Smoothing(0, 0.0, ks[0], float(right.mean()), float(right.mean()))
    if alphas == (0.0,):
        return best
    best = best if config.alpha == "auto" else best._replace(after=-1.0)    # a fixed alpha is always used
    for layer in range(features.shape[1]):
        found = {(alpha, k): prior.clone() for alpha in alphas for k in ks}
        for part in parts:
            graph = neighbours(features[part.to(features.device), layer], max(ks))
            for candidate, p in smoothed(graph, prior[part], alphas, ks, config.gamma).items():
                found[candidate][part] = p
        for (alpha, k), p in found.items():
            gain = ((p > 0.5) == (truth > 0.5))[rows].double() - right
            bar = 2 * gain.std() / len(gain) ** 0.5 if config.alpha == "auto" else -2.0
            if gain.mean() > bar and right.mean() + gain.mean() > best.after:
                best = Smoothing(layer, alpha, k, float(right.mean()), float((right + gain).mean()))
    return best


class Selected(NamedTuple):
    """Steps 5 and 6: labels of D_u, (n_u,) each."""
    tau: float
    is_self: Tensor         # bool, routed to the own label
    routed: Tensor          # own label where routed, weak label elsewhere
    refined: Tensor         # weak labels smoothed in the presence of the own ones
    selective: Tensor       # own label where routed, refined elsewhere: the method
    smoothed_weak: Tensor   # weak labels smoothed alone
    chosen: Smoothing
    chosen_alone: Smoothing


def select(config: Config, prep: Prepared, p_ik: Tensor, tau: float | str | None = None) -> Selected:
    """5. Route: own label where P(IK) >= tau. 6. Smooth the other weak labels over the graph of D_u."""
    L, U, weak = prep.usable.nonzero()[:, 0], prep.D_u, prep.weak[:prep.n_u]
    tau = config.tau if tau is None else tau
    tau = accuracy(prep.cross, prep.truth) if tau == "auto" else float(tau)                         # [D4]
    routed, is_self = route(p_ik[U], prep.own[U], weak, tau)
    cross, truth, half = prep.cross[prep.usable], prep.truth[prep.usable], prep.half[prep.usable]
    routed_l, is_self_l = route(p_ik[L], prep.own[L], cross, tau)

    prior, prior_l = (routed, routed_l) if config.anchors else (weak, cross)                        # [D5]
    item_l, item_u = prep.item[L].to(config.device), prep.item[U].to(config.device)
    chosen = choose_smoothing(item_l, prior_l, truth, ~is_self_l, half, config)                     # [D6]
    alone = choose_smoothing(item_l, cross, truth, torch.ones_like(is_self_l), half, config)
    refined = smooth(item_u[:, chosen.layer], prior, chosen.alpha, chosen.k, config.gamma)
    smoothed_weak = smooth(item_u[:, alone.layer], weak, alone.alpha, alone.k, config.gamma)
    selective = torch.where(is_self, prep.own[U], refined)
    return Selected(tau, is_self, routed, refined, selective, smoothed_weak, chosen, alone)


# ------------------------------------------------------------------------------------------------ 7. Students
def log_confidence(p: Tensor, w: Tensor, fraction: float, a_max: float = 0.5, ramp: float = 0.2) -> Tensor:
    """Target of Burns' auxiliary confidence loss: (1 - a) w + a 1[p > t], t making as many of a batch
    positive as the weak labels' sum says (rounded half to even; ties of p to the lower index); a grows
    linearly to a_max in the first fifth of steps, no jump."""
    a = a_max * min(1.0, fraction / ramp)
    positives = int(round(float(w.mean()) * len(w)))
    hard = torch.zeros_like(w)
    hard[p.argsort(descending=True, stable=True)[:positives]] = 1
    return (1 - a) * w + a * hard


def product(p: Tensor, w: Tensor, fraction: float) -> Tensor:
    """Target: student times weak probability, renormalised, at every fraction of the steps alike (Lang et al.
    2025, arXiv 2501.13124)."""
    yes, no = p * w, (1 - p) * (1 - w)
    return yes / (yes + no).clamp_min(1e-12)


def surer_half(weak: Tensor) -> Tensor:
    """Indices of the more confident half of each predicted class, so that class balance survives [D10]."""
    sure = (weak - 0.5).abs()
    classes = ((weak > 0.5).nonzero()[:, 0], (weak <= 0.5).nonzero()[:, 0])
    surer = [c[sure[c].argsort(descending=True, stable=True)[:(len(c) + 1) // 2]] for c in classes]
    return torch.cat(surer).sort().values


def trust(prep: Prepared, p_ik: Tensor) -> Tensor:
    """Per-item router, the symmetric form: own label where P(IK) >= P(weak right), a second linear probe."""
    U, L = prep.D_u, prep.usable.nonzero()[:, 0]
    right = ((prep.cross > 0.5) == (prep.truth > 0.5))[L]
    probe = fit_probe(prep.item[L, -1], right.double(), fold=prep.fold[L])
    return route(p_ik[U], prep.own[U], prep.weak[:prep.n_u], probe.predict(prep.item[U, -1]))[0]


def all_truth(prep: Prepared) -> Tensor:
    """(N,) ground truth of every item: for the ceiling, the oracle and the metrics only."""
    return torch.tensor([float(item.label) for item in prep.rows])


def hidden_truth(prep: Prepared) -> Tensor:
    """(n_u,) ground truth of D_u: for the ceiling and the metrics."""
    return all_truth(prep)[prep.D_u]


def oracle_p_ik(prep: Prepared) -> Tensor:
    """(N,) 1 where the own label agrees with the truth, of D_u too: the oracle's P(IK)."""
    return (prep.own == all_truth(prep)).float()


def students(config: Config, prep: Prepared, s: Selected, p_ik: Tensor, strong: Side, seed: int,
             stages: Stages, tell):
    """7. The pretrained strong model finetuned on each label set: {method: (labels, P(y = 1), weights)}."""
    U, weak, own = torch.arange(len(prep.rows))[prep.D_u], prep.weak[:prep.n_u], prep.own[prep.D_u]
    recipes = {     # name: (training rows, their targets, rule: target from student and weak probability)
        "ceiling": lambda: (U, hidden_truth(prep), None),
        "naive": lambda: (U, weak, None),
        "logconf": lambda: (U, weak, log_confidence),
        "product": lambda: (U, weak, product),
        "confidence-only": lambda: (U[surer_half(weak)], weak[surer_half(weak)], None),
        "self-only": lambda: (U, own, None),                                # tau = 0
        "strong-on-D_l": lambda: (torch.arange(prep.n_l), prep.truth, None),
        "graph-only": lambda: (U, s.smoothed_weak, None),                   # tau > 1
        "route-only": lambda: (U, s.routed, None),                          # alpha = 0
        "selective": lambda: (U, s.selective, None),
        "trust": lambda: (U, trust(prep, p_ik), None),
        "chain": lambda: (U, student("naive")[1][:prep.n_u], None),         # weak -> student -> student
        "oracle": lambda: (U, select(config, prep, oracle_p_ik(prep), tau=0.5).selective, None),
    }

    def student(name):
        rows, targets, rule = recipes[name]()
        out = trained(name, strong, [prep.ids[i] for i in rows], targets, prep.ids[prep.n_l:], config, seed,
                      stages, rule)
        return targets if rows is U else None, out["p"], hexed(out)

    done = {"weak": (weak, prep.weak, prep.weak_weights)}
    for name in config.methods:
        if name != "weak":
            done[name] = student(name)
            tell(f"7 student  {name}")
    return {name: done[name] for name in config.methods}


# -------------------------------------------------------------------------------------------------- 8. Report
def one_seed(config: Config, task, weak: Side, strong: Side, seed: int, stages: Stages, tell) -> dict:
    """Steps 1 to 7 for one seed: arrays of every label source and of every method's probabilities."""
    prep = prepare(config, task, weak, strong, seed, stages, tell)
    known = know(config, prep)
    right = (prep.belief[:prep.n_l].argmax(1) == prep.gold).double()
    tell(f"4 P(IK)    held-out AUROC on D_l "
         f"{auroc(known.p_ik[:prep.n_l][prep.usable], right[prep.usable]) or float('nan'):.3f} "
         f"(layer read {known.layer + 1} of {prep.prompt.shape[1]}, l2 {known.probe.l2:g})")
    s = select(config, prep, known.p_ik)
    c = s.chosen
    tell(f"5 route    tau {s.tau:.3f}: own label on {s.is_self.double().mean():.3f} of D_u")
    tell(f"6 smooth   no label of D_l is left to choose by: alpha {c.alpha:g}" if c.before is None else
         f"6 smooth   alpha {c.alpha:g}, k {c.k}: accuracy of D_l's unrouted labels "
         f"{c.before:.3f} -> {c.after:.3f}" + ("" if c.alpha else " (off: no smoothing helps there)"))
    done = students(config, prep, s, known.p_ik, strong, seed, stages, tell)
    return record(config, prep, known, s, done, seed)


def judged_right(config: Config, prep: Prepared) -> Tensor:
    """(N,) 1 where the strong model's own answer is right; for metrics."""
    return (prep.belief.argmax(1) == answers(config, prep.rows, prep.questions)).float()


def homophily(prep: Prepared, chosen: Smoothing) -> float:
    """Share of neighbours on the graph of D_u that share the truth; for metrics."""
    index, _ = neighbours(prep.item[prep.D_u, chosen.layer], chosen.k)
    return float((hidden_truth(prep)[index] == hidden_truth(prep)[:, None]).double().mean())


def record(config: Config, prep: Prepared, known: Known, s: Selected, done: dict, seed: int) -> dict:
    """One seed's arrays and choices, as named in items.npz, result.json; here metrics may read the truth."""
    n_l, n_u = prep.n_l, prep.n_u
    own_right, truth = judged_right(config, prep), all_truth(prep)

    def part(a, b, extra):
        arrays = {"truth": truth[a:b], "own": prep.own[a:b], "own_p": prep.belief[a:b].amax(1).float(),
                  "own_right": own_right[a:b], "p_ik": known.p_ik[a:b], **extra,
                  **{f"p/{name}": out[1][a - n_l:b - n_l] for name, out in done.items()}}
        ids = np.array([row.id for row in prep.rows[a:b]])
        group = np.array([q.group for q in prep.questions[a:b]])
        return {"id": ids, "group": group} | {key: x.numpy() for key, x in arrays.items()}
    labels = {f"label/{name}": out[0] for name, out in done.items() if out[0] is not None}
    sources = {"weak": prep.weak[:n_u], "is_self": s.is_self, "refined": s.refined,
               "smoothed_weak": s.smoothed_weak}
    return {"seed": seed, "tau": s.tau, "layer": known.layer, "l2": known.probe.l2,
            "smoothing": s.chosen._asdict(), "smoothing_graph_only": s.chosen_alone._asdict(),
            "homophily": homophily(prep, s.chosen_alone),
            "weights": {name: out[2] for name, out in done.items()},
            "n": {"labelled": n_l, "transfer": n_u, "test": len(prep.rows) - n_l - n_u},
            "truth_used": {"ceiling": n_u, "self-only": config.shots, "oracle": n_l + n_u},
            "transfer": part(n_l, n_l + n_u, sources | labels), "test": part(n_l + n_u, len(prep.rows), {})}


def fitted(task, sides, config: Config, tell) -> tuple:
    """The task as both models can read it, and how many of its questions had to be changed for that."""
    room = min(1024, *(side.model.config.context for side in sides))
    task, counts = fit(task, [side.tokenizer.encode for side in sides], room,
                       apart=config.protocol == "paper", limit=config.limit)
    tell(f"data      {task.name}: {len(task.train):,} train and {len(task.test):,} test questions" +
         (" (synthetic world, see data/world.py)" if task.name in DEMO else "") +
         (f"; {counts['left_out']} of train left out: test has them" if counts["left_out"] else "") +
         (f"; {counts['cut']} contexts cut to fit {room} tokens" if counts["cut"] else ""))
    return task, counts


def run(config: Config) -> dict:
    """The method for all seeds; writes <out>/<task>/<run id>/{items.npz, result.json}, returns the result."""
    start, cuda = time.perf_counter(), config.device.startswith("cuda")

    def tell(line: str):
        print(f"[{time.perf_counter() - start:6.1f} s] {line}", flush=True)
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {config.out}: {error.strerror}; choose another folder") from None
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    print(shown(config))
    task = load_task(config.task, data_dir=config.data_dir or None)
    weak = open_side(config.weak or str(HERE / "data/demo/weak"), config)
    strong = open_side(config.strong or str(HERE / "data/demo/strong"), config)
    task, counts = fitted(task, (weak, strong), config, tell)
    stages = Stages(Path(config.out) / "cache", tell, config.device)
    runs = []
    for seed in config.seeds:
        runs.append(one_seed(config, task, weak, strong, seed, stages, tell))
    analysis = None
    if config.analysis:
        analysis = analyse(sys.modules[__name__], config, task, weak, strong, stages, tell)
    folder, result = write(config, task, counts, {"weak": weak, "strong": strong}, stages, runs, analysis,
                           time.perf_counter() - start)
    try:
        drawn = figures(folder)
    except ImportError:
        drawn = ["(figures: pip install matplotlib, then run the same command again)"]
    print(f"\n{table(result['metrics'])}\n")
    print(f"written   {folder}/ " + " ".join(["result.json", "items.npz", *drawn]))
    return result


def main(argv: list[str] | None = None) -> int:
    """0 done, 2 a user's mistake (one line on stderr), 130 interrupted (finished stages are kept)."""
    try:
        config = parse(argv)
        rerun(config, run) if config.rerun else run(config)
        return 0
    except (LoadError, DataError, TrainError) as error:
        print(f"selw2s: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not out_of_memory(error):
            raise
        print("selw2s: out of memory: use a smaller model, --limit, or a machine with more "
              "(finished stages are kept: start again)", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"selw2s: {error} (finished stages are kept: start again)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nselw2s: interrupted; finished stages are kept: start the same command again",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
