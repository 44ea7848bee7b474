"""Write tests/golden/*.safetensors: inputs and results of every part of the method, for ports of selw2s.

    python tests/make_golden.py [FOLDER]     3 seconds; port_numpy.py reads all without torch, and
                                             golden/compare.py holds the tolerances

Inputs are stored, not seeds. What no line marks float64, int32 or uint8 is float32 and was computed in
float32. metadata: versions, and in the family files "config", the config.json. Shapes as in model.py and
graph.py: P tokens of all sequences, B sequences, C width, V vocabulary; N items, C features, k neighbours.

gpt2, llama, gemma3_text .safetensors        a shaken checkpoint and what it computes; P = 39, B = 3
    weight/NAME          as in the file      a tensor of model.safetensors under its Hugging Face name
    weight/score.weight  (2, C)              classifier head, row 1 = "y is 1"; not part of the checkpoint
    tokens, lengths      (P,), (B,) int32    sequences of 5, 13 and 21 tokens end to end, no padding
    hidden.{i}           (P, C)              residual stream after block i, 0 = embeddings (and positions)
    hidden.final         (P, C)              after the final norm
    logits               (P, V)              of the language model's head
    option.loglik        (2,)                sum of log p(token | before) of two options after one prompt, the
                                             last sequence's first 15 tokens: its last 6, and the first 4 of
                                             the sequence before
    target               (B,)                soft labels w = P(y = 1)
    loss                 ()                  mean over B of -(1 - w) log p_0 - w log p_1; p of score h,
                                             h the last token's hidden.final, by softmax
    gradient.NAME        like weight/NAME    d loss / d embedding, first query matrix (fused in gpt2), score

    gpt2         LayerNorm, learned positions, (in, out) matrices, fused q k v, tanh GELU, tied head
    llama        RMSNorm, 4 heads of 8 on width 20, 2 key/value heads, llama3 RoPE scaling (one channel kept,
                 one blended, two slowed), SwiGLU, own head
    gemma3_text  1 + w, norms before and after, q and k norms, scaled embedding, blocks 0 and 1 with a window
                 of 6 tokens and a RoPE base of their own, block 2 linearly scaled, tied head, capped logits
    Their eps is 1e-3, and a gain, bias or matrix is nowhere near its initial value: what is forgotten shows.

graph.safetensors                            graph.py; row 11 of x is a twin of row 5, row 29 is zero
    x, Y                 (97, 13), (97, 3)   features, labels
    cosine.index         (97, 7) int32       neighbours by cosine; ties: lower index first
    cosine.similarity    (97, 7)
    S.crow, S.col        (98,), (E,) int32   CSR pattern of W and S, gamma 3, made of the stored similarity
    W.value, S.value     (E,) float64
    F.half, F.most       (97, 3) float64     alpha 0.5, 0.99

method.safetensors                           selw2s.py and data/results/metrics.py
    probe.features       (60, 6)             column 4 is constant
    probe.hard, .soft    (60,)               the two kinds of target
    probe.fold           (60,) int32         rows held out together
    hard.l2, soft.l2     () float64          penalty given
    cv.l2                () float64          chosen on the folds, for probe.hard, from 10, 1, .3, .1, .03, .01
    cv.held_out          (60,)               its out-of-fold probabilities, fitted to a gradient of 1e-5
    cv.loss              ()                  and their cross-entropy
    FIT.weight, FIT.bias (6,), () float64    for FIT hard, soft, cv: applies to raw features
    FIT.p                (60,) float64       sigmoid(features weight + bias)
    route.p_ik, .own, .weak  (12,)           P(IK), self-generated 0/1 and weak soft labels
    route.tau            ()                  float32(0.7): one p_ik equals it, and is below a float64 0.7
    route.label          (12,)               own where P(IK) >= tau, else weak
    route.is_self        (12,) uint8
    smooth.features      (40, 8)             centred before kNN
    smooth.prior         (40,)               weak P(y = 1); Y = [1 - prior, prior]
    smooth.p             (40,)               F_1 / (F_0 + F_1) for alpha 0.9, k 5, gamma 3
    loss.p, loss.w       (16,)               student's P(y = 1), three tied at the cut; weak labels of sum 6.5
    loss.fraction        (2,) float64        of the steps done
    loss.log_confidence  (2, 16)             target at each fraction; 6.5 rounds to the even 6
    loss.product         (16,)               the same at each fraction; item 0: yes + no = 0 gives 0
    metric.p, metric.y   (57,)               many ties, some at exactly 1/2; truth 0/1
    metric.{accuracy, auroc, brier, cross_entropy}  () float64
    metric.ece           () float64          10 bins of equal count: seven of 6 items, then three of 5; items
                                             of the same p in their order
    metric.accuracies    (3,) float64        of weak, student, ceiling
    metric.pgr           () float64

select_on, select_off .safetensors           steps 5 and 6 with all that they choose: selw2s.select; in the
                                             second one smoothing beside own labels fails [D6]'s test
    learn.weak, .own, .truth, .p_ik  (48,)   D_l: cross-fitted weak P(y = 1), own 0/1 labels, truth, P(IK)
    learn.knows          (48,) uint8         the own answer (among all options) is right
    learn.fold, .group   (48,) int32         3 folds; questions of one group are right or wrong together
    learn.states         (48, 2, 6)          item_state, of two layers
    transfer.weak, .own, .p_ik  (30,)        D_u, whose groups are its own
    transfer.by_fold     (3, 30)             D_u's weak labels by the supervisor that did not see fold f
    transfer.states      (30, 2, 6)
    tau.{answers, labels, item}  (30,)       P(IK) from which an item of D_u takes its own label, by rule [D4]
    select.rule          () int32            the one taken, 0, 1 or 2: two are right equally often on D_l, and
                                             the first of them is it
    select.is_self       (30,) uint8
    select.routed        (30,)               own where is_self, else weak
    select.refined       (30,)               these smoothed, --anchors 1
    select.smoothed_weak (30,)               the weak labels smoothed alone
    CHOICE.layer, .k     () int32            for CHOICE chosen (beside own labels) and alone [D6]: of alphas
    CHOICE.alpha         () float64          .3, .5, .7, .9, .97 and k 5, 10, 20 (50 is above the smallest
    CHOICE.before, .after  () float64        view); accuracy of D_l's scored labels before and after
"""
import json
import platform
import sys
import tempfile
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import graph  # noqa: E402
import model as M  # noqa: E402
import selw2s  # noqa: E402
from data import architecture as A  # noqa: E402
from data import checkpoint as C  # noqa: E402
from data.results import metrics as measures  # noqa: E402

CONFIGS = {
    "gpt2": dict(vocab_size=53, n_positions=32, n_embd=24, n_layer=2, n_head=3, layer_norm_epsilon=1e-3,
                 activation_function="gelu_new"),
    "llama": dict(vocab_size=53, hidden_size=20, intermediate_size=28, num_hidden_layers=3,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
                  hidden_act="silu", rms_norm_eps=1e-3, tie_word_embeddings=False, rope_theta=100.0,
                  rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                    original_max_position_embeddings=32)),
    "gemma3_text": dict(vocab_size=53, hidden_size=20, intermediate_size=28, num_hidden_layers=3,
                        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
                        hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-3, query_pre_attn_scalar=24,
                        sliding_window=6, layer_types=["sliding_attention"] * 2 + ["full_attention"],
                        rope_theta=1000.0, rope_local_base_freq=50.0, final_logit_softcapping=8.0,
                        pad_token_id=None,      # else transformers takes 0, whose embedding gets no gradient
                        rope_scaling=dict(rope_type="linear", factor=8.0))}
QUERY = {"gpt2": "transformer.h.0.attn.c_attn.weight"}      # the others name it as llama does
LENGTHS = [5, 13, 21]


def tensor(x):
    return torch.from_numpy(np.asarray(x, np.float32))


def checkpoint(config, rng):
    """The tensors of model.safetensors, shaken: matrices N(0, 1 / fan in), gains and biases off 1 and 0."""
    row, out = A.FAMILIES[config.family], {}
    for source, names, shapes in A.tensors(config):
        x = tensor(rng.randn(sum(shape[0] for shape in shapes), *shapes[0][1:]))
        if x.ndim == 1:
            x = 0.3 * x + float(source.endswith("weight") and not row.get("plus_one"))
        elif names[0] in ("embed.weight", "pos.weight"):
            x = x / 2 if config.tied else x
        else:
            x = x / x.shape[1] ** 0.5
        name = source if names == ["head.weight"] else row["prefix"] + source
        out[name] = (x.t() if C.turned(row, source, x) else x).contiguous()
    return out


def family(raw, rng):
    """A family's file: checkpoint, input, and everything from the embeddings to the classifier's gradient."""
    config = A.configure(raw)
    weights = checkpoint(config, rng)
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder) / "model.safetensors")
        params, _ = C.read_params(config, C.tensor_files(Path(folder)), "cpu", torch.float32)
    weights["score.weight"] = tensor(rng.randn(2, config.width) / config.width ** 0.5)
    tokens, target = torch.from_numpy(rng.randint(53, size=sum(LENGTHS))), tensor([0.2, 0.95, 0.6])
    score = weights["score.weight"].clone().requires_grad_()
    net = M.Transformer(config, params).requires_grad_()
    *states, final = net.packed(tokens, LENGTHS, (*range(config.layers + 1), None))
    z = final[torch.tensor(LENGTHS).cumsum(0) - 1] @ score.T                    # (B, 2)
    loss = -(torch.stack([1 - target, target], 1) * z.log_softmax(1)).sum(1).mean()
    loss.backward()
    _, b, c = (part.tolist() for part in tokens.split(LENGTHS))
    reading = M.read(net, [c[:15]], [[c[15:], b[:4]]], [-1])
    row, gradients = A.FAMILIES[config.family], {name: x.grad for name, x in net.params.items()}
    gradients = C.export(config, gradients | {"head.weight": params["embed.weight"]})   # its own is None
    embed = row["prefix"] + row["names"]["embed"] + ".weight"
    query = QUERY.get(config.family, "model.layers.0.self_attn.q_proj.weight")
    return ({"weight/" + name: x for name, x in weights.items()}
            | {f"hidden.{i}": x for i, x in enumerate(states)}
            | {"hidden.final": final, "logits": net.logits(final),
               "option.loglik": reading.loglik[0].float(), "target": target, "loss": loss,
               "tokens": tokens.int(), "lengths": torch.tensor(LENGTHS).int(),
               "gradient.score.weight": score.grad}
            | {"gradient." + name: gradients[name] for name in (embed, query)})


def graph_file(rng):
    x, Y = tensor(rng.randn(97, 13)), tensor(rng.rand(97, 3))
    x[11], x[29] = x[5], 0      # a twin; a row whose cosines are all 0, so that it is isolated
    index, similarity = graph.knn(x, 7)
    W = graph.affinity(index, similarity)
    S = graph.normalise(W)
    return {"x": x, "Y": Y, "cosine.index": index.int(), "cosine.similarity": similarity,
            "S.crow": S.crow_indices().int(), "S.col": S.col_indices().int(),
            "W.value": W.values(), "S.value": S.values(),
            "F.half": graph.propagate(S, Y, 0.5, tol=1e-12).F,
            "F.most": graph.propagate(S, Y, 0.99, tol=1e-12).F}


def probes(rng):
    x = tensor(rng.randn(60, 6) * [1, 2, 0.5, 1, 0, 3] + [0, 1, 0, -2, 0.5, 0])
    soft = torch.sigmoid(x @ tensor([3, -1.4, 0, 0.8, 0, 0.2]) + tensor(rng.randn(60)) + 3)
    hard, fold = (soft > tensor(rng.rand(60))).float(), torch.from_numpy(rng.permutation(60) % 4)
    out = {"probe.features": x, "probe.hard": hard, "probe.soft": soft, "probe.fold": fold.int()}
    fits = {"hard": selw2s.fit_probe(x, hard, l2=0.05), "soft": selw2s.fit_probe(x, soft, l2=0.2),
            "cv": selw2s.fit_probe(x, hard, fold=fold)}
    for name, fit in fits.items():
        out |= {f"{name}.weight": fit.weight, f"{name}.bias": fit.bias, f"{name}.p": fit.predict(x),
                f"{name}.l2": torch.tensor(fit.l2, dtype=torch.float64)}
    return out | {"cv.held_out": fits["cv"].held_out.float(),
                  "cv.loss": torch.tensor(fits["cv"].loss)}


def selection(rng):
    p_ik, own, weak = tensor(rng.rand(12)), tensor(rng.randint(2, size=12)), tensor(rng.rand(12))
    p_ik[7], own[7] = 0.7, 1
    label, is_self = selw2s.route(p_ik, own, weak, 0.7)
    x, prior = tensor(rng.randn(40, 8) + 2), tensor(rng.rand(40))
    return {"route.p_ik": p_ik, "route.own": own, "route.weak": weak, "route.tau": torch.tensor(0.7),
            "route.label": label, "route.is_self": is_self.to(torch.uint8), "smooth.features": x,
            "smooth.prior": prior, "smooth.p": selw2s.smooth(x, prior, 0.9, 5, 3.0)}


def losses():
    w = tensor([16, 4, 11, 0, 9, 2, 14, 7, 3, 1, 12, 5, 8, 2, 6, 4]) / 16       # mean * 16 = 6.5 exactly
    p = tensor([0, .31, .62, .08, .62, .45, .88, .5, .93, .21, .71, .62, .97, .12, .83, .55])
    return {"loss.p": p, "loss.w": w, "loss.fraction": torch.tensor([0.05, 0.6], dtype=torch.float64),
            "loss.log_confidence": torch.stack([selw2s.log_confidence(p, w, f) for f in (0.05, 0.6)]),
            "loss.product": selw2s.product(p, w, 0.05)}


def metrics(rng):
    y = rng.randint(2, size=57)
    p = tensor(np.round(np.clip(0.5 + 0.15 * (2 * y - 1) + 0.3 * rng.randn(57), 0, 1) * 16) / 16)
    y, accuracies = tensor(y), (0.61, 0.68, 0.83)
    numbers = {name: getattr(measures, name)(p, y)
               for name in ("accuracy", "auroc", "brier", "cross_entropy", "ece")}
    numbers |= {"accuracies": accuracies, "pgr": measures.pgr(*accuracies)}
    return {"metric.p": p, "metric.y": y} | {
        f"metric.{name}": torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}


def select_file(rng):
    n, m, folds = 48, 30, 3
    truth = rng.randint(2, size=n + m)
    sign = 2 * truth - 1
    weak = np.clip(0.5 + 0.11 * sign + 0.25 * rng.randn(n + m), 0.02, 0.98)
    by_fold = np.clip(weak[n:] + 0.1 * rng.randn(folds, m), 0.02, 0.98)
    own = np.where(rng.rand(n + m) < 0.7, truth, 1 - truth)
    knows = (own == truth) & (rng.rand(n + m) < 0.9)
    p_ik = 1 / (1 + np.exp(-1.5 * (knows - 0.3) - 0.8 * rng.randn(n + m)))
    states = rng.randn(n + m, 2, 6)
    states[:, 1, 0] += 2.5 * sign
    group = np.append(rng.permutation(n) // 2, n + np.arange(m))
    arrays = [tensor(x) for x in (weak, own, p_ik, states, truth)]
    (weak, own, p_ik, states, truth), gold = arrays, torch.zeros(n).long()
    belief = torch.stack([torch.from_numpy(knows[:n]), ~torch.from_numpy(knows[:n])], 1).double()
    fold = torch.from_numpy(group[:n] % folds)
    asked = [types.SimpleNamespace(group=g) for g in group]
    learn = selw2s.Part(None, asked[:n], weak=weak[:n], own=own[:n], truth=truth[:n], fold=fold,
                        belief=belief, gold=gold, item_state=states[:n])
    transfer = selw2s.Part(None, asked[n:], weak=weak[n:], own=own[n:], item_state=states[n:])
    supervised = selw2s.Supervised(weak[:n], weak[n:], None, "", tensor(by_fold), weak[None, n:])
    prep = selw2s.Prepared(0, learn, learn, transfer, None, supervised)
    config = selw2s.Config(folds=folds)
    s = selw2s.select(config, prep, p_ik[:n], p_ik[n:])
    tau = {rule: selw2s.thresholds(replace(config, tau=rule), prep, p_ik[:n])[2] for rule in selw2s.TAU_RULES}
    out = {"learn.weak": weak[:n], "learn.own": own[:n], "learn.truth": truth[:n], "learn.p_ik": p_ik[:n],
           "learn.knows": torch.from_numpy(knows[:n]).to(torch.uint8), "learn.fold": fold.int(),
           "learn.group": torch.from_numpy(group[:n]).int(), "learn.states": states[:n],
           "transfer.weak": weak[n:], "transfer.own": own[n:], "transfer.p_ik": p_ik[n:],
           "transfer.by_fold": supervised.by_fold, "transfer.states": states[n:],
           "select.rule": torch.tensor(selw2s.TAU_RULES.index(s.rule)).int(),
           "select.is_self": s.is_self.to(torch.uint8), "select.routed": s.routed,
           "select.refined": s.refined, "select.smoothed_weak": s.smoothed_weak}
    for name, choice in (("chosen", s.chosen), ("alone", s.chosen_alone)):
        for key, x in choice._asdict().items():
            dtype = torch.int32 if key in ("layer", "k") else torch.float64
            out[f"{name}.{key}"] = torch.tensor(x, dtype=dtype)
    return out | {f"tau.{rule}": x for rule, x in tau.items()}


def main(folder=HERE / "golden"):
    def save(name, file, **metadata):
        file = {key: x.detach().clone(memory_format=torch.contiguous_format) for key, x in file.items()}
        save_file(file, Path(folder) / f"{name}.safetensors", metadata=versions | metadata)

    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    for seed, (name, numbers) in enumerate(CONFIGS.items()):    # RandomState: its stream is frozen for good
        raw = dict(model_type=name, **numbers)
        save(name, family(raw, np.random.RandomState(seed)), config=json.dumps(raw))
    save("graph", graph_file(np.random.RandomState(3)))
    rng = np.random.RandomState(4)
    save("method", probes(rng) | selection(rng) | losses() | metrics(rng))
    save("select_on", select_file(np.random.RandomState(45)))       # these two show test_port.py's traps
    save("select_off", select_file(np.random.RandomState(19)))


if __name__ == "__main__":
    main(*sys.argv[1:])
