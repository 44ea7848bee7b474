"""selw2s in plain NumPy: the parts that a port to another framework must reproduce, to be copied.

    python tests/port_numpy.py [FOLDER]     a second; numpy and safetensors only: no torch, no network

compares all of them with the golden files; make_golden.py describes those, golden/compare.py reads
them. For the eye, not for speed: one sequence at a time, no padding, all in float64.

T tokens, B sequences, C width, H heads, K key/value heads, D head dimension, V vocabulary; N items, k
neighbours, M classes. p, y, w (N,): probability, target in [0, 1], weak label; w of the probe: its weights.
"""
import itertools
import sys
from statistics import NormalDist

import numpy as np


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ---- networks: (config, weights, tokens (T,)) -> [states (T, C): 0 = embeddings ... n, final], logits (T, V)

def attend(q, k, v, scale, window=None):
    """q (T, H, D), k and v (T, K, D) -> (T, H D). A key/value head serves H / K neighbouring query heads."""
    T, H, _ = q.shape
    k, v = (np.repeat(x, H // x.shape[1], axis=1) for x in (k, v))
    scores = scale * np.einsum("ihd,jhd->hij", q, k)
    ago = np.arange(T)[:, None] - np.arange(T)                  # a window counts the token itself
    scores[:, (ago < 0) | (ago >= (window or T))] = -np.inf
    return np.einsum("hij,jhd->ihd", np.exp(log_softmax(scores)), v).reshape(T, -1)


def rotate(x, base, scaling):
    """RoPE on x (T, H, D): channels d and d + D / 2 are a pair."""
    frequency = base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])           # (D / 2,)
    slow = frequency / scaling.get("factor", 1)
    if scaling.get("rope_type") == "llama3":                    # fast turns kept, slow ones slowed further
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        slow = slow + (frequency - slow) * np.clip((turns - low) / (high - low), 0, 1)
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * slow)                 # (T, 1, D / 2)
    pairs = turn * (x[..., :len(slow)] + 1j * x[..., len(slow):])
    return np.concatenate([pairs.real, pairs.imag], -1)


def rms(x, eps):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps)


def gelu(x):                                                    # the tanh form: all three files ask for it
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x ** 3)))


def gpt2(config, w, tokens):
    def linear(x, name):                                        # Conv1D keeps (in, out)
        return x @ w[f"transformer.{name}.weight"] + w[f"transformer.{name}.bias"]

    def norm(x, name):
        x = rms(x - x.mean(-1, keepdims=True), config["layer_norm_epsilon"])
        return x * w[f"transformer.{name}.weight"] + w[f"transformer.{name}.bias"]

    T, H, embedding = len(tokens), config["n_head"], w["transformer.wte.weight"]
    states = [embedding[tokens] + w["transformer.wpe.weight"][:T]]
    for h in [f"h.{i}." for i in range(config["n_layer"])]:
        x = states[-1]
        q, k, v = linear(norm(x, h + "ln_1"), h + "attn.c_attn").reshape(T, 3, H, -1).swapaxes(0, 1)
        x = x + linear(attend(q, k, v, q.shape[-1] ** -0.5), h + "attn.c_proj")
        states.append(x + linear(gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj"))
    states.append(norm(states[-1], "ln_f"))
    return states, states[-1] @ embedding.T


def llama(config, w, tokens):
    """llama and gemma3_text, whose gains are 1 + weight and which norms each part after it as well."""
    gemma, T, heads = config["model_type"] == "gemma3_text", len(tokens), config["num_attention_heads"]
    D = config.get("head_dim") or config["hidden_size"] // heads
    scale = (config["query_pre_attn_scalar"] if gemma else D) ** -0.5

    def linear(x, name):                                        # (out, in)
        return x @ w[f"model.{name}.weight"].T

    def norm(x, name):
        return rms(x, config["rms_norm_eps"]) * ((1 if gemma else 0) + w[f"model.{name}.weight"])

    embedding = w["model.embed_tokens.weight"]
    states = [embedding[tokens] * (config["hidden_size"] ** 0.5 if gemma else 1)]
    for i, h in enumerate(f"layers.{i}." for i in range(config["num_hidden_layers"])):
        rope, window = (config["rope_theta"], config.get("rope_scaling") or {}), None
        if gemma and config["layer_types"][i] == "sliding_attention":
            rope, window = (config["rope_local_base_freq"], {}), config["sliding_window"]
        x, y = states[-1], norm(states[-1], h + "input_layernorm")
        q, k, v = (linear(y, f"{h}self_attn.{part}_proj").reshape(T, -1, D) for part in "qkv")
        if gemma:                                               # over D, before RoPE
            q, k = norm(q, h + "self_attn.q_norm"), norm(k, h + "self_attn.k_norm")
        y = linear(attend(rotate(q, *rope), rotate(k, *rope), v, scale, window), h + "self_attn.o_proj")
        x = x + (norm(y, h + "post_attention_layernorm") if gemma else y)
        y = norm(x, h + ("pre_feedforward_layernorm" if gemma else "post_attention_layernorm"))
        gate, up = linear(y, h + "mlp.gate_proj"), linear(y, h + "mlp.up_proj")
        y = linear((gelu(gate) if gemma else gate * sigmoid(gate)) * up, h + "mlp.down_proj")
        states.append(x + (norm(y, h + "post_feedforward_layernorm") if gemma else y))
    states.append(norm(states[-1], "norm"))
    logits, cap = states[-1] @ w.get("lm_head.weight", embedding).T, config.get("final_logit_softcapping")
    return states, cap * np.tanh(logits / cap) if cap else logits


NETWORKS = {"gpt2": gpt2, "llama": llama, "gemma3_text": llama}


def option_loglik(net, config, w, prompt, option):
    """Sum of log p(token | before) over an option's tokens after a prompt's: how the own answer is chosen."""
    logits = net(config, w, np.append(prompt, option))[1]
    return log_softmax(logits)[np.arange(len(prompt) - 1, len(logits) - 1), option].sum()


def classifier_loss(final, w, target):
    """Mean soft-label cross-entropy, of the last tokens' final states (B, C) against P(y = 1) (B,)."""
    log_p = log_softmax(final @ w["score.weight"].T)            # (B, 2)
    return -((1 - target) * log_p[:, 0] + target * log_p[:, 1]).mean()


# ---- graph -------------------------------------------------------------------------------------------------

def knn(x, k):
    """index, similarity (N, k), no row its own. Pair by pair: in a matrix product twins may fail to tie."""
    x = x.astype(np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)    # a zero row is at 0 from all
    s = np.stack([(x * row).sum(1) for row in x])
    np.fill_diagonal(s, -np.inf)
    s = s.astype(np.float32)                                    # tied is what is equal when rounded
    index = np.argsort(-s, axis=1, kind="stable")[:, :k]        # stable: ties to the lower index
    return index, np.take_along_axis(s, index, 1)


def affinity(index, similarity, gamma=3.0):
    A, s = np.zeros((len(index), len(index))), np.maximum(similarity.astype(np.float64), 0)
    np.put_along_axis(A, index, np.where(s > 0, s ** gamma, 0), 1)          # gamma 0: 0 ** 0 would be 1
    return A + A.T                                              # a mutual pair counts twice


def normalise(W):
    degree = W.sum(1)
    scale = (degree > 0) / np.sqrt(np.where(degree > 0, degree, 1))
    return scale[:, None] * W * scale


def propagate(S, Y, alpha):
    """F (N, M), by a dense solve; large N needs conjugate gradients. Isolated rows keep their Y."""
    F, u = Y.astype(np.float64), S.any(1)
    F[u] = np.linalg.solve(np.eye(u.sum()) - alpha * S[u][:, u], (1 - alpha) * F[u])
    return F


# ---- P(IK), routing, smoothing, targets, metrics -----------------------------------------------------------

def standardise(features):
    """(N, C + 1) with a last column of ones, for the bias; mean, scale (C,)."""
    mean, scale = features.mean(0), np.maximum(features.std(0, ddof=1), 1e-6)   # over N - 1, as torch
    return np.column_stack([(features - mean) / scale, np.ones(len(features))]), mean, scale


def gradient(x, y, l2, w):
    """Gradient and Hessian of mean CE(sigmoid(x w), y) + l2 / 2 |w|^2, a penalty that spares the bias."""
    p, penalty = sigmoid(x @ w), l2 * (np.arange(len(w)) < len(w) - 1)
    return x.T @ (p - y) / len(y) + penalty * w, (x.T * (p * (1 - p))) @ x / len(y) + np.diag(penalty)


def fit(x, y, l2):
    w = np.zeros(x.shape[1])
    for _ in range(30):                                         # Newton: selw2s.logistic is for large C
        slope, curvature = gradient(x, y, l2, w)
        w = w - np.linalg.solve(curvature, slope)
    return w


def cross_validate(x, y, fold):
    """(l2, its out-of-fold p (N,)); x standardised by all rows, ties to the larger penalty."""
    out = {}
    for l2 in (10.0, 1.0, 0.3, 0.1, 0.03, 0.01):
        out[l2] = np.empty(len(y))
        for rest in (fold != f for f in np.unique(fold)):
            out[l2][~rest] = sigmoid(x[~rest] @ fit(x[rest], y[rest], l2))
    return min(out.items(), key=lambda item: metrics(item[1], y)["cross_entropy"])


def route(p_ik, own, weak, tau):
    return np.where(p_ik >= tau, own, weak), p_ik >= tau


def smooth(features, prior, alpha, k, gamma):
    W = affinity(*knn(features - features.mean(0), k), gamma)   # raw hidden states share one large direction
    F = propagate(normalise(W), np.stack([1 - prior, prior], 1), alpha)
    return F[:, 1] / F.sum(1)


def log_odds(p):
    p = np.clip(p.astype(np.float64), 1e-6, 1 - 1e-6)
    return np.log(p) - np.log(1 - p)


def thresholds(learn, weak):
    """(best, [(tau of D_l, tau of D_u) by answers, labels, item]); best: the first rule of those whose labels
    of D_l are most often right. learn: D_l's weak, own, truth, p_ik, knows, fold (N,); weak: D_u's."""
    right, q = (learn["weak"] > 0.5) == (learn["truth"] > 0.5), 0.0
    if not learn["knows"].all():        # of the wrong answers, whose label is right all the same
        q = min((learn["own"] == learn["truth"])[learn["knows"] == 0].mean(), 1 - 1e-6)
    x, mean, scale = standardise(np.abs(log_odds(learn["weak"]))[:, None])
    l2, sure = cross_validate(x, right, learn["fold"])
    w, a = fit(x, right, l2), right.mean()
    sure_u = sigmoid((np.abs(log_odds(weak)) - mean) / scale * w[0] + w[1])
    rules = [(np.full(len(right), t), np.full(len(weak), t)) for t in (a, (a - q) / (1 - q))]
    rules.append(((sure - q) / (1 - q), (sure_u - q) / (1 - q)))
    labels = [route(learn["p_ik"], learn["own"], learn["weak"], tau)[0] for tau, _ in rules]
    accuracy = [((p > 0.5) == (learn["truth"] > 0.5)).mean() for p in labels]
    return accuracy.index(max(accuracy)), rules


def choose_smoothing(views, alphas=(0.3, 0.5, 0.7, 0.9, 0.97), ks=(5, 10, 20, 50), gamma=3.0):
    """(layer, alpha, k, accuracy before, after), alpha 0: off. views: (states (M, R, C), prior, truth,
    scored, group (M,)) of each fold of D_l beside D_u. Ties go to the lower layer, then k, then alpha."""
    ks = [k for k in ks if k < max(6, min(len(view[1]) for view in views))]
    layers = views[0][0].shape[1]

    def right(labels):
        return np.concatenate([((p > 0.5) == (truth > 0.5))[scored]
                               for p, (_, _, truth, scored, _) in zip(labels, views)]).astype(float)
    group = np.concatenate([view[4][view[3]] for view in views])
    before = right([view[1] for view in views])
    best = 0, 0.0, ks[0], before.mean(), before.mean()
    z = NormalDist().inv_cdf(1 - 0.05 / (layers * len(alphas) * len(ks)))       # McNemar over groups
    for layer, k, alpha in itertools.product(range(layers), ks, alphas):
        now = right([smooth(view[0][:, layer], view[1], alpha, k, gamma) for view in views])
        net = np.sign(np.bincount(group, now - before))
        if net.sum() > z * np.abs(net).sum() ** 0.5 and now.mean() > best[-1]:
            best = layer, alpha, k, before.mean(), now.mean()
    return best


def select(learn, transfer):
    """Steps 5 and 6: what golden/compare.py asks for."""
    rule, rules = thresholds(learn, transfer["weak"])
    tau_learn, tau = rules[rule]
    routed, is_self = route(transfer["p_ik"], transfer["own"], transfer["weak"], tau)
    _, is_self_learn = route(learn["p_ik"], learn["own"], learn["weak"], tau_learn)
    alone, beside, unknown = [], [], np.full(len(tau), np.nan)
    for f, weak in enumerate(transfer["by_fold"]):
        at = learn["fold"] == f
        states = np.concatenate([learn["states"][at], transfer["states"]])
        prior, truth = np.append(learn["weak"][at], weak), np.append(learn["truth"][at], unknown)
        own, is_own = np.append(learn["own"][at], transfer["own"]), np.append(is_self_learn[at], is_self)
        group = np.append(learn["group"][at], learn["group"].max() + 1 + np.arange(len(tau)))
        alone.append((states, prior, truth, ~np.isnan(truth), group))
        beside.append((states, np.where(is_own, own, prior), truth, ~np.isnan(truth) & ~is_own, group))
    out = {"tau": [tau for _, tau in rules], "rule": rule, "is_self": is_self, "routed": routed,
           "chosen": choose_smoothing(beside), "alone": choose_smoothing(alone)}

    def smoothed(labels, layer, alpha, k, *_):
        return smooth(transfer["states"][:, layer], labels, alpha, k, 3.0) if alpha else labels
    return out | {"refined": smoothed(routed, *out["chosen"]),
                  "smoothed_weak": smoothed(transfer["weak"], *out["alone"])}


def log_confidence(p, w, fraction):
    a, hard = 0.5 * min(1, fraction / 0.2), np.zeros(len(w))    # as many as sum w, rounded half to even
    hard[np.argsort(-p, kind="stable")[:round(float(w.mean()) * len(w))]] = 1
    return (1 - a) * w + a * hard


def product(p, w):
    return p * w / np.maximum(p * w + (1 - p) * (1 - w), 1e-12)


def pgr(weak, student, ceiling):
    return (student - weak) / (ceiling - weak)                  # undefined unless ceiling > weak


def metrics(p, y):
    q, pairs = np.clip(p, 1e-12, 1 - 1e-12), p[y > 0.5][:, None] - p[y < 0.5]   # every positive and negative
    bins = np.array_split(np.argsort(p, kind="stable"), 10)     # equal counts; the first N mod 10 one more
    return {"accuracy": ((p > 0.5) == (y > 0.5)).mean(), "brier": ((p - y) ** 2).mean(),
            "auroc": ((pairs > 0) + 0.5 * (pairs == 0)).mean(),
            "cross_entropy": -(y * np.log(q) + (1 - y) * np.log(1 - q)).mean(),
            "ece": sum(len(b) * abs(p[b].mean() - y[b].mean()) for b in bins) / len(p)}


if __name__ == "__main__":
    from golden import compare
    sys.exit(compare.main(sys.modules[__name__], *sys.argv[1:]))
