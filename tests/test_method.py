"""selw2s.py's pure parts by hand, brute force and scikit-learn. Run: pytest tests/test_method.py (10 s)."""
import math

import numpy as np
import pytest
import torch

import selw2s as s
from data.results import metrics as m
from data.results import report as r
from data.cache import digest


def close(a, b, tol=1e-12):
    assert abs(a - b) <= tol, (a, b)


# ---------------------------------------------------------------------------------------------------- metrics
def test_accuracy_pgr_brier():
    p, y = torch.tensor([0.9, 0.2, 0.6, 0.5]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    close(m.accuracy(p, y), 0.5)                        # 0.5 is not above 1/2: counts as "no"
    close(m.brier(torch.tensor([0.5, 1.0]).double(), torch.tensor([1.0, 1.0])), 0.125)
    close(m.pgr(0.6, 0.7, 0.8), 0.5, 1e-9)
    assert m.pgr(0.8, 0.9, 0.8) is None and m.pgr(0.8, 0.9, 0.7) is None


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    p = torch.tensor(rng.integers(0, 7, 101) / 7.0)     # many ties
    y = torch.tensor(rng.integers(0, 2, 101).astype(float))
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y == 1].tolist() for b in p[y == 0].tolist()]
    close(m.auroc(p, y), float(np.mean(pairs)), 1e-12)
    assert m.auroc(p, torch.ones(101)) is None


def test_ece_bins_hold_equal_counts():
    p = torch.tensor([0.1, 0.1, 0.2, 0.9, 0.9, 0.8], dtype=torch.float64)
    y = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0]).double()
    # two bins of three: mean p 0.4/3 against 1/3, 2.6/3 against 2/3
    close(m.ece(p, y, bins=2), 0.5 * abs(0.4 / 3 - 1 / 3) + 0.5 * abs(2.6 / 3 - 2 / 3))
    assert [n for *_, n in m.reliability(torch.rand(103), torch.ones(103))] == [11, 11, 11] + [10] * 7


def test_sign_flip_enumerates_and_cannot_go_below_its_floor():
    close(m.sign_flip([1.0, 1.0, 1.0]), 0.25)           # all the same sign: the smallest there is, 2 / 2^3
    close(m.sign_flip([3.0, -1.0, 1.0]), m.sign_flip([-3.0, 1.0, -1.0]))
    flips = [abs(a * 3 + b * 1 + c * 1) >= 3 for a in (1, -1) for b in (-1, 1) for c in (-1, 1)]
    close(m.sign_flip([3.0, -1.0, 1.0]), float(np.mean(flips)))
    assert m.sign_flip([1.0] * 6) == 2 / 2 ** 6
    ones = [math.comb(20, n) / 2 ** 20 for n in range(21)]      # n of 20 are +1: their sum is 2 n - 20
    exact = sum(p * np.mean([abs(2 * n - 20 + a) >= 8 for a in (8, 0, 0, -8)]) for n, p in enumerate(ones))
    close(m.sign_flip([1.0, -1.0] * 10 + [4.0] * 2), exact, 0.01)       # 22 seeds: by chance
    for n in (17, 40, 70):      # nor by chance: one flip, the observed, is as far; beyond the 62nd seed too
        close(m.sign_flip([1.0] * n + [0.0] * 2), 1 / (2 ** 16 + 1), 2e-4)
        assert m.sign_flip([1.0] * n) > 0
    close(m.sign_flip([0.0] * 62 + [1.0, -1.0]), 1.0)
    close(m.sign_flip([0.0] * 64 + [1.0, 1.0]), 0.5, 0.01)


def test_bootstrap_is_paired_and_seeded():
    rng = np.random.default_rng(1)
    a = rng.random((1, 3, 400)) < 0.7
    right = np.concatenate([a, a, ~a]).astype(float)
    each = np.arange(400)
    draws = m.bootstrap(right, each, draws=500)
    np.testing.assert_array_equal(draws[:, 0], draws[:, 1])     # same items: the difference has no variance
    np.testing.assert_allclose(draws[:, 0] + draws[:, 2], 1)    # and the complement is drawn with it
    np.testing.assert_array_equal(draws, m.bootstrap(right, each, draws=500))
    one = m.bootstrap(right[:, :1], each, draws=4000)[:, 0]             # one seed: binomial standard error
    p = right[0, 0].mean()
    assert abs(one.std() / math.sqrt(p * (1 - p) / 400) - 1) < 0.05


def test_bootstrap_draws_whole_groups():
    """Items that are right or wrong four at a time carry a quarter of the information."""
    rng = np.random.default_rng(2)
    first = (rng.random((1, 1, 100)) < 0.6).astype(float)
    right, group = np.repeat(first, 4, 2), np.repeat(np.arange(100), 4).astype(str)
    p = first.mean()
    for grouping, n in ((group, 100), (np.arange(400), 400)):
        assert abs(m.bootstrap(right, grouping, draws=4000).std() / math.sqrt(p * (1 - p) / n) - 1) < 0.05
    uneven = m.bootstrap(np.array([[[1, 1, 1, 0.0]]]), np.array(list("aaab")), draws=4000)[:, 0]
    assert set(np.round(uneven, 6)) == {0.0, 0.75, 1.0}     # b b, a b, a a: shares of items


def test_summarise_says_pgr_is_undefined_in_a_small_gap():
    def fake(weak, student, ceiling, n=1000):
        truth = np.ones(n)
        p = {f"p/{m}": (np.arange(n) < round(a * n)).astype(float) for m, a in
             (("weak", weak), ("naive", student), ("ceiling", ceiling))}
        names = np.array([f"q{i}/0" for i in range(n)])
        test = {"id": names, "group": names, "truth": truth, **p}
        return {"test": test, "transfer": {"truth": truth, "weak": truth, "group": names},
                "truth_used": {"ceiling": 7}, "cross_fitted": 0.9, "cross_fitted_error": 0.1,
                "trained": True, "n": {"labelled": 5, "transfer": n},
                "weights": dict.fromkeys(("weak", "naive", "ceiling"), "")}
    methods = ("weak", "ceiling", "naive")
    small = r.summarise([fake(0.70, 0.702, 0.703)], methods)
    assert small["pgr_defined"] is False and small["methods"]["naive"]["pgr"] is None
    assert "PGR undefined" in r.table(small)
    large = r.summarise([fake(0.6, 0.7, 0.8)], methods)
    close(large["methods"]["naive"]["pgr"], 0.5, 1e-9)
    lo, hi = large["methods"]["naive"]["pgr_ci95"]
    assert 0.3 < lo < 0.5 < hi < 0.7
    assert [large["methods"][m]["ground_truth_labels"] for m in methods] == [5, 7, 5]
    # the ceiling under the weak model
    below = r.summarise([fake(0.7, 0.6, 0.5), fake(0.7, 0.62, 0.5)], methods)
    assert below["pgr_defined"] is False and below["gap"]["mean"] == pytest.approx(-0.2)
    rows = below["methods"]
    assert "minus_naive" not in rows["naive"] and rows["naive"]["attainable"] and rows["weak"]["attainable"]
    close(rows["weak"]["minus_naive"]["mean"], 0.09, 1e-9)
    close(rows["ceiling"]["minus_naive"]["mean"], -0.11, 1e-9)
    assert rows["ceiling"]["minus_naive"]["smallest_p"] == 0.5 and rows["naive"]["per_seed"] == [0.6, 0.62]


def test_seeds_are_joined_by_question():
    """Another seed may show the test items in another order, with other candidates: --protocol openai."""
    y, p = np.array([1.0, 0, 1, 0, 1]), np.array([0.9, 0.9, 0.9, 0.1, 0.1])     # wrong: q1, q4
    runs = []
    for order, shown in ((range(5), "0"), ((4, 2, 0, 3, 1), "2")):
        test = {"id": np.array([f"q{i}/{shown}" for i in order]), "group": np.array([f"g{i}" for i in order]),
                "truth": y[list(order)], "p/weak": p[list(order)]}
        half = {"weak": np.ones(4), "truth": np.ones(4), "group": np.arange(4)}
        runs.append({"test": test, "transfer": half, "truth_used": {}, "n": {"labelled": 5, "transfer": 4},
                     "cross_fitted": 0.9, "cross_fitted_error": 0.1, "trained": True,
                     "weights": {"weak": ""}})
    one, two = r.summarise(runs[:1], ("weak",)), r.summarise(runs, ("weak",))
    assert one["methods"]["weak"]["ci95"] == two["methods"]["weak"]["ci95"]     # the second seed adds nothing
    assert two["methods"]["weak"]["per_seed"] == [0.6, 0.6] and two["test_groups"] == 5 and two["seeds"] == 2
    runs[1]["test"]["id"][0] = "q7/0"
    with pytest.raises(AssertionError):
        r.summarise(runs, ("weak",))


# ------------------------------------------------------------------------------------------------------ probe
def blobs(n, c, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=g) * torch.rand(c, generator=g).mul(5) + torch.randn(c, generator=g)
    return x, ((x @ torch.randn(c, generator=g) / c ** 0.5 + torch.randn(n, generator=g)) > 0).double()


@pytest.mark.parametrize("n, c, l2", [(211, 13, 0.1), (61, 97, 0.01), (503, 31, 1e-4)])
def test_probe_equals_scikit_learn(n, c, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(n, c)
    probe = s.fit_probe(x, y, l2=l2)
    z = ((x.double() - x.double().mean(0)) / x.double().std(0)).numpy()
    reference = linear_model.LogisticRegression(C=1 / (l2 * n), tol=1e-12, max_iter=100000).fit(z, y.numpy())
    np.testing.assert_allclose(probe.predict(x).numpy(), reference.predict_proba(z)[:, 1], atol=1e-6)


def test_probe_gradient_is_zero_for_soft_targets():
    x, _ = blobs(89, 11)
    y = torch.rand(89, generator=torch.Generator().manual_seed(3)).double()
    probe = s.fit_probe(x, y, l2=0.03)
    scale = x.double().std(0)
    z = (x.double() - x.double().mean(0)) / scale
    w = probe.weight * scale
    gradient = z.T @ (probe.predict(x) - y) / 89 + 0.03 * w
    assert float(gradient.norm()) <= 2e-8 and abs(float((probe.predict(x) - y).mean())) <= 2e-8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fixed", [None, 0.1])
def test_probe_of_features_or_targets_that_are_not_finite_ends_at_once(value, fixed, monkeypatch):
    """In the first Newton step, before its conjugate gradients: those of a wide probe spin for minutes."""
    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy_with_logits",
                        lambda *_: pytest.fail("went on"))
    x, y = blobs(60, 7)
    x[41, 3] = value
    with pytest.raises(s.TrainError, match="^the probe's features are not finite: use --dtype bfloat16"):
        s.fit_probe(x, y, l2=fixed)
    x, y = blobs(60, 7)
    y[41] = value
    with pytest.raises(s.TrainError, match="not finite"):
        s.fit_probe(x, y, l2=fixed)


def test_probe_cross_validation_respects_folds():
    """A feature naming the group predicts within a group and nothing beyond: only grouped folds see that."""
    g = torch.Generator().manual_seed(0)
    group = torch.arange(60).repeat_interleave(4)
    x = torch.nn.functional.one_hot(group).float()
    y = (torch.rand(60, generator=g) > 0.5).double()[group]
    by_group, by_row = s.fit_probe(x, y, fold=group % 5), s.fit_probe(x, y)
    assert m.auroc(by_row.held_out, y) > 0.95
    assert m.auroc(by_group.held_out, y) < 0.65
    assert by_group.l2 == 10.0 and by_row.l2 < 1


# ----------------------------------------------------------------------------------------- routing, smoothing
def test_route_by_hand_and_its_limits():
    p_ik = torch.tensor([0.2, 0.7, 0.9, 0.7])
    own, weak = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.3, 0.4, 0.6, 0.1])
    label, is_self = s.route(p_ik, own, weak, 0.7 - 1e-6)
    assert label.tolist() == torch.tensor([0.3, 1.0, 0.0, 0.0]).tolist()
    assert is_self.tolist() == [False, True, True, True]
    assert torch.equal(s.route(p_ik, own, weak, 1.01)[0], weak)
    assert torch.equal(s.route(p_ik, own, weak, 0.0)[0], own)
    per_item = s.route(p_ik, own, weak, torch.tensor([0.1, 0.8, 0.8, 0.8]))[1]
    assert per_item.tolist() == [True, False, True, False]
    shares = [s.route(p_ik, own, weak, t / 10)[1].sum() for t in range(11)]
    assert all(a >= b for a, b in zip(shares, shares[1:]))


def clusters(n=300, d=17, seed=0, noise=0.25):
    """Two tight clusters that are the two classes; weak labels wrong on a share of the items."""
    g = torch.Generator().manual_seed(seed)
    truth = (torch.arange(n) % 2).float()
    centre = torch.randn(2, d, generator=g)
    x = centre[truth.long()] + 0.3 * torch.randn(n, d, generator=g) + 5
    wrong = torch.rand(n, generator=g) < noise
    return x, torch.where(wrong, 1 - truth, truth) * 0.8 + 0.1, truth


def test_smoothing_repairs_random_errors_where_neighbours_share_the_truth():
    x, prior, truth = clusters()
    assert m.accuracy(prior, truth) < 0.8
    assert m.accuracy(s.smooth(x, prior, 0.9, 10, 3.0), truth) > 0.98
    assert s.smooth(x, prior, 0.0, 10, 3.0) is prior


def two_views(x, prior, truth, layers=None):
    """Two graphs of 150 items each, both classes in each; all items scored."""
    half = torch.arange(300) // 2 % 2
    near = [[s.neighbours(layer[half == h], max(s.KS)) for layer in layers or [x]] for h in (0, 1)]
    return [s.View(near[h], prior[half == h], truth[half == h], torch.ones(150, dtype=torch.bool),
                   torch.arange(300)[half == h]) for h in (0, 1)]


def test_two_models_biases_do_not_pass_for_the_gain_of_smoothing():
    """One view's model says yes to all, the other's no: mixed on one graph they look repaired, which no D_u
    can be."""
    x, _, truth = clusters()
    half, g = torch.arange(300) // 2 % 2, torch.Generator().manual_seed(2)
    prior = 0.5 + 0.2 * (half * 2 - 1) + 0.25 * (truth - 0.5) * torch.rand(300, generator=g)
    mixed = s.smooth(x, prior, 0.97, 10, 3.0)
    assert m.accuracy(prior, truth) == 0.5 and m.accuracy(mixed, truth) > 0.9
    chosen = s.choose_smoothing(two_views(x, prior, truth), s.Config())
    assert chosen.alpha == 0 and chosen.after == 0.5


def test_chosen_alpha_is_off_where_neighbours_do_not_share_the_truth():
    x, prior, truth = clusters()
    good = s.choose_smoothing(two_views(x, prior, truth), s.Config())
    assert good.alpha > 0 and good.after > good.before + 0.1
    shuffled = truth[torch.randperm(300, generator=torch.Generator().manual_seed(5))]
    flipped = torch.rand(300, generator=torch.Generator().manual_seed(6)) < 0.2
    prior = torch.where(flipped, 1 - shuffled, shuffled)
    bad = s.choose_smoothing(two_views(x, prior, shuffled), s.Config())
    assert bad.alpha == 0 and bad.after == bad.before
    forced = s.choose_smoothing(two_views(x, prior, shuffled), s.Config(alpha=0.9, k=10))
    assert forced.alpha == 0.9 and forced.k == 10 and forced.after < forced.before


def test_the_best_of_many_noisy_candidates_is_not_taken():
    """Labels at chance, states that say nothing: by two standard errors the best of the sixty candidates
    would be taken in five of these worlds."""
    on = 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        truth, x = (torch.arange(300) % 2).float(), [torch.randn(300, 5, generator=g) for _ in range(3)]
        prior = torch.where(torch.rand(300, generator=g) < 0.5, 1 - truth, truth) * 0.4 + 0.3
        on += s.choose_smoothing(two_views(x[0], prior, truth, x), s.Config()).alpha > 0
    assert on <= 2


def test_a_group_counts_once():
    """Every wrong label is repaired, but all of a few groups' items: too few to say."""
    x, prior, truth = clusters()
    graphs = two_views(x, prior, truth)
    assert s.choose_smoothing(graphs, s.Config()).alpha > 0
    few = [view._replace(group=view.group % 4) for view in graphs]
    assert s.choose_smoothing(few, s.Config()).alpha == 0


def test_the_right_layer_is_chosen():
    x, prior, truth = clusters()
    junk = torch.randn(300, 17, generator=torch.Generator().manual_seed(9))
    assert s.choose_smoothing(two_views(x, prior, truth, [junk, x]), s.Config()).layer == 1


def test_only_what_is_scored_decides():
    x, prior, truth = clusters()
    graphs = two_views(x, prior, truth)
    right = (prior > 0.5) == (truth > 0.5)
    half = torch.arange(300) // 2 % 2
    graphs = [view._replace(scored=right[half == h]) for h, view in enumerate(graphs)]
    chosen = s.choose_smoothing(graphs, s.Config())     # where all are right, nothing can be better
    assert (chosen.alpha, chosen.before, chosen.after) == (0, 1, 1)


def test_a_fixed_k_is_not_lowered_to_what_d_l_allows():
    features, truth, config = torch.randn(12, 4), torch.arange(12) % 2.0, s.Config(alpha=0.5, k=50)
    view = s.View([s.neighbours(features, 50)], truth, truth, torch.ones(12, dtype=torch.bool),
                  torch.arange(12))
    assert s.choose_smoothing([view, view], config).k == 50
    lone = s.View([None], truth[:1], truth[:1], torch.ones(1, dtype=torch.bool), torch.arange(1))
    chosen = s.choose_smoothing([view, lone], config)      # one item has no neighbours: nothing to choose by
    assert (chosen.alpha, chosen.k, chosen.before) == (0.5, 50, None)


def part(n, seed=0, fold=True):
    """A Part of n items with random contents, K = 4 options, R = 2 states of width 3, groups of two five
    places apart; of D_l truth, fold."""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(n, 4, generator=g, dtype=torch.float64)
    option = torch.randint(4, (n,), generator=g)
    truth = (torch.rand(n, generator=g) < 0.5).float()
    items = [s.Item(f"q{i}/{o}", f"q{i}", "", int(o), int(t)) for i, (o, t) in enumerate(zip(option, truth))]
    belief = p / p.sum(1, keepdim=True)
    known = {}
    if fold:
        known = dict(truth=truth, gold=torch.randint(4, (n,), generator=g), fold=torch.arange(n) % 5)
    questions = [s.Question(f"q{i}", f"{seed} {i // 10} {i % 5}", "", "?", tuple("abcd"), 0)
                 for i in range(n)]
    return s.Part(items, questions, [[i] for i in range(n)], torch.rand(n, generator=g),
                  (belief.argmax(1) == option).float(), belief.gather(1, option[:, None])[:, 0].float(),
                  belief, torch.randn(n, 2, 3, generator=g), torch.randn(n, 2, 3, generator=g), **known)


def prepared(n=50, m=40):
    labelled = part(n)
    by_fold = torch.rand(5, m, generator=torch.Generator().manual_seed(7))
    transfer, test = part(m, 1, fold=False), part(m, 2, fold=False)
    weak = s.Supervised(labelled.weak, transfer.weak, test.weak, "w", by_fold, transfer.weak[None])
    return s.Prepared(0, labelled, labelled, transfer, test, weak)


def test_views_hold_one_supervisors_labels_and_score_its_held_out_fold_alone():
    prep = prepared()
    own_l, own_u = torch.rand(50) < 0.4, torch.rand(40) < 0.4
    for anchors in (True, False):
        graphs = s.routed_views(s.views(prep, s.Config()), prep, own_l, own_u, anchors)
        assert len(graphs) == 5
        for f, view in enumerate(graphs):
            at = prep.learn.fold == f
            weak = torch.cat([prep.learn.weak[at], prep.supervised.by_fold[f]])
            own, is_own = torch.cat([prep.learn.own[at], prep.transfer.own]), torch.cat([own_l[at], own_u])
            assert torch.equal(view.prior, torch.where(is_own, own, weak) if anchors else weak)
            states = torch.cat([prep.learn.item_state[at], prep.transfer.item_state])
            for layer, (index, similarity) in enumerate(view.near):
                x = states[:, layer] - states[:, layer].mean(0)
                assert torch.equal(index, s.knn(x, 49)[0]) and index.shape == similarity.shape == (50, 49)
            assert view.scored.tolist() == (~own_l[at]).tolist() + [False] * 40
            assert torch.equal(view.truth[:10], prep.learn.truth[at]) and view.truth[10:].isnan().all()
            groups = [q.group for n, q in enumerate(prep.learn.questions) if at[n]]
            groups += [q.group for q in prep.transfer.questions]
            assert len(groups) == len(view.group) == 50 and len(set(groups)) == 5 + 20
            assert len(set(zip(groups, view.group.tolist()))) == len(set(view.group.tolist())) == 25


def test_neighbours_of_a_fold_are_found_once_and_only_to_choose_by(monkeypatch):
    prep, found, real = prepared(), [], s.neighbours
    monkeypatch.setattr(s, "neighbours", lambda x, *rest: found.append(len(x)) or real(x, *rest))
    p_learn, p_transfer = (torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (50, 40))
    s.select(s.Config(), prep, p_learn, p_transfer)
    assert found.count(50) == 5 * 2         # folds, hidden states; D_u alone has 40 items
    found.clear()
    s.select(s.Config(alpha=0), prep, p_learn, p_transfer)
    assert not found


def test_take_keeps_rows_of_every_field_together():
    labelled, rows = part(50), torch.arange(50) % 3 == 1
    taken = s.take(labelled, rows)
    for name, value in labelled._asdict().items():
        expected = [value[i] for i in range(50) if rows[i]] if isinstance(value, list) else value[rows]
        got = getattr(taken, name)
        assert got == expected if isinstance(value, list) else torch.equal(got, expected), name
    assert s.take(part(9, fold=False), torch.arange(9) < 4).truth is None


# ------------------------------------------------------------------------- thresholds, routers, fused labels
def test_thresholds_by_hand():
    """a = supervisor right on D_l, q = own labels right among wrong answers: labels is (a - q) / (1 - q)."""
    prep = prepared()
    learn = prep.learn
    a = m.accuracy(learn.weak, learn.truth)
    wrong = learn.belief.argmax(1) != learn.gold
    q = m.accuracy(learn.own[wrong], learn.truth[wrong])
    p = torch.rand(50, generator=torch.Generator().manual_seed(4))
    for rule, value in (("answers", a), ("labels", (a - q) / (1 - q))):
        name, tau_l, tau_u = s.thresholds(s.Config(tau=rule), prep, p)
        assert name == rule and len(tau_l) == 50 and len(tau_u) == 40
        close(float(tau_l[0]), value, 1e-6)
        assert (tau_l == tau_l[0]).all() and (tau_u == tau_l[0]).all()
    name, tau_l, tau_u = s.thresholds(s.Config(tau=0.7), prep, p)
    assert name == "fixed" and (tau_u == np.float32(0.7)).all()
    name, tau_l, tau_u = s.thresholds(s.Config(tau="item"), prep, p)
    weak_right = ((learn.weak > 0.5) == (learn.truth > 0.5)).double()
    sure = s.fit_probe(s.log_odds(learn.weak).abs()[:, None], weak_right, fold=learn.fold)
    confidence = sure.predict(s.log_odds(prep.transfer.weak).abs()[:, None])
    torch.testing.assert_close(tau_u, ((confidence - q) / (1 - q)).float())
    torch.testing.assert_close(tau_l, ((sure.held_out - q) / (1 - q)).float())
    name, tau_l, _ = s.thresholds(s.Config(), prep, p)
    right = {}
    for rule in s.TAU_RULES:
        tau = s.thresholds(s.Config(tau=rule), prep, p)[1]
        right[rule] = m.accuracy(s.route(p, learn.own, learn.weak, tau)[0], learn.truth)
    assert right[name] == max(right.values()) and len(set(right.values())) > 1


def test_thresholds_where_every_own_label_is_right():
    prep = prepared()
    learn = prep.learn._replace(own=prep.learn.truth)
    _, _, tau = s.thresholds(s.Config(tau="labels"), prep._replace(learn=learn), torch.rand(50))
    assert tau.isfinite().all() and (tau < 0).all()         # own label everywhere


def test_routers_see_what_they_say():
    some = part(9)
    for r, state in enumerate(s.router_features("probe", some)):
        assert torch.equal(state, some.prompt_state[:, r].double())
    belief, = s.router_features("belief", some)
    assert belief.shape == (9, 4) and (belief.diff(dim=1) <= 0).all()
    torch.testing.assert_close(belief.exp().sum(1), torch.ones(9, dtype=torch.float64))
    for r, both in enumerate(s.router_features("both", some)):
        assert torch.equal(both, torch.cat([some.prompt_state[:, r].double(), belief], 1))


def test_belief_tells_right_answers_where_the_state_does_not():
    prep = prepared(200, 40)
    own = prep.learn.belief.argmax(1)
    gold = torch.where(prep.learn.belief.amax(1) > 0.4, own, (own + 1) % 4)
    prep = prep._replace(learn=prep.learn._replace(gold=gold))
    right = (prep.learn.belief.argmax(1) == gold).double()
    area = {router: m.auroc(s.know(s.Config(), prep, router).learn, right) for router in s.ROUTERS}
    assert area["belief"] > 0.95 and area["both"] > 0.95 and abs(area["probe"] - 0.5) < 0.2
    known = s.know(s.Config(), prep, "both")
    torch.testing.assert_close(known.predict(prep.transfer), known.transfer)


def test_fused_is_a_logistic_regression_on_six_named_features():
    linear_model = pytest.importorskip("sklearn.linear_model")
    prep = prepared(200, 40)
    p_l, p_u = torch.rand(200), torch.rand(40)
    got = s.fused(prep, p_l, p_u)

    def features(some, p):
        weak, strong = (np.log(x / (1 - x)) for x in (some.weak.double().numpy(),
                                                      some.zero_shot.double().numpy()))
        p = p.double().numpy()
        return np.stack([weak, strong, p, weak * strong, weak * p, strong * p], 1)
    x = features(prep.learn, p_l)
    mean, scale = x.mean(0), x.std(0, ddof=1)
    l2 = s.fit_probe(torch.tensor(x), prep.learn.truth, fold=prep.learn.fold).l2
    model = linear_model.LogisticRegression(C=1 / (l2 * 200), tol=1e-12, max_iter=100000)
    model.fit((x - mean) / scale, prep.learn.truth.numpy())
    expected = model.predict_proba((features(prep.transfer, p_u) - mean) / scale)[:, 1]
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("size, answers, flags, lr, epochs", [
    (2e7, False, {}, 5e-4, 2), (2.7e8, False, {}, 5e-5, 2), (7e9, False, {}, 1e-5, 2),
    (2.7e8, True, {}, 2e-5, 1), (7e9, True, {}, 4e-6, 1), (2.7e8, True, {"tune": "lora"}, 2e-4, 1),
    (2.7e8, True, {"lr": 1e-3, "epochs": 3}, 1e-3, 3), (2.7e8, False, {"epochs": 1}, 5e-5, 1)])
def test_learning_rate_and_passes(size, answers, flags, lr, epochs):
    config = s.Config(**flags)
    assert s.learning_rate(size, answers, config) == pytest.approx(lr)
    assert s.passes(answers, config) == epochs


# ----------------------------------------------------------------------------------------------------- losses
def test_log_confidence_by_hand_and_without_the_public_jump():
    p, w = torch.tensor([0.9, 0.1, 0.6, 0.4]), torch.tensor([0.2, 0.3, 0.8, 0.7])  # mean(w) 0.5: 2 positives
    assert torch.equal(s.log_confidence(p, w, 0.0), w)
    hard = torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(s.log_confidence(p, w, 1.0), 0.5 * w + 0.5 * hard)
    steps = [float((s.log_confidence(p, w, f / 1000) - w).abs().max()) for f in range(1001)]
    assert max(b - a for a, b in zip(steps, steps[1:])) < 0.003         # the public code jumps by 0.36 here
    assert steps[200] == steps[1000] and steps[100] == pytest.approx(steps[200] / 2, rel=1e-4)


@pytest.mark.parametrize("mean", [0.0, 0.21, 0.5, 0.97, 1.0])
def test_log_confidence_threshold_matches_the_weak_mean(mean):
    p = torch.rand(32, generator=torch.Generator().manual_seed(0))
    hard = 2 * (s.log_confidence(p, torch.full((32,), mean), 1.0) - 0.5 * mean)
    assert abs(float(hard.mean()) - mean) <= 0.5 / 32 + 1e-6
    assert set(hard.round(decimals=4).tolist()) <= {0.0, 1.0}


def test_product_target_by_hand():
    p, w = torch.tensor([0.5, 0.8, 1.0]), torch.tensor([0.3, 0.5, 0.9])
    torch.testing.assert_close(s.product(p, w, 0.3), torch.tensor([0.3, 0.8, 1.0]))
    close(float(s.product(torch.tensor([0.6]), torch.tensor([0.7]), 0.0)), 0.42 / (0.42 + 0.12), 1e-6)


# ----------------------------------------------------------------------------------------------------- stages
def test_digest_sees_every_bit_dtype_shape_and_source():
    a = torch.arange(6.0)
    flipped = a.clone()
    flipped[3] = float(np.nextafter(np.float32(3), np.float32(4)))
    seen = {digest(a), digest(flipped), digest(a.reshape(2, 3)), digest(a.double()),
            digest(a.tolist()), digest(s.product), digest(s.log_confidence), digest("ab", "c"),
            digest("a", "bc"), digest(1), digest(1.0)}
    assert len(seen) == 11 and digest(a) == digest(a.clone())


def test_stage_is_computed_once_and_again_when_damaged(tmp_path):
    calls, told = [], []
    stages = s.Stages(tmp_path, told.append)

    def compute():
        calls.append(1)
        return {"p": torch.arange(4.0), "n": torch.tensor([7]), "weights": "a hash"}
    first = stages("finetune", "weak", (1, torch.ones(2)), compute)
    again = s.Stages(tmp_path, told.append)("finetune", "cross", (1, torch.ones(2)), compute)
    assert len(calls) == 1 and torch.equal(first["p"], again["p"])
    assert set(again) == {"p", "n", "weights"} and again["weights"] == "a hash"
    stages("finetune", "weak", (2, torch.ones(2)), compute)
    assert len(calls) == 2
    file = sorted(tmp_path.iterdir())[0]
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4                                        # one bit
    file.write_bytes(raw)
    for n in (1, 2):
        stages("finetune", "weak", (n, torch.ones(2)), compute)
    assert len(calls) == 3 and len(told) == 1 and "damaged" in told[0]
    file.write_bytes(file.read_bytes().replace(b'"p"', b'"q"'))     # one bit of a name
    assert set(stages("finetune", "weak", (1, torch.ones(2)), compute)) == {"p", "n", "weights"}
    assert set(stages("finetune", "weak", (2, torch.ones(2)), compute)) == {"p", "n", "weights"}
    assert len(calls) == 4 and len(told) == 2
    file.write_bytes(file.read_bytes()[:50])            # truncated
    for n in (1, 2):
        stages("finetune", "weak", (n, torch.ones(2)), compute)
    assert len(calls) == 5 and not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_interrupted_stage_leaves_nothing(tmp_path):
    stages = s.Stages(tmp_path, print)
    with pytest.raises(KeyboardInterrupt):
        stages("read", "read", (), lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ diagnostics
def diagnosed():
    """Eight test items, worked out by hand: y, weak p, student p, ceiling p."""
    y = np.array([1, 1, 1, 1, 0, 0, 0, 0.0])
    weak = np.array([.9, .6, .2, .1, .1, .4, .8, .9])     # right: 0 1 4 5; doubtful (within 1/4 of 1/2): 1, 5
    naive = np.array([.8, .9, .1, .6, .2, .8, .9, .4])    # right: 0 1 3 4 7; wrong: 2 5 6
    ceiling = np.array([.9, .9, .9, .6, .1, .1, .9, .3])  # right: all but 6; known (3/4 sure): 0 1 2 4 5
    part = {"id": np.arange(8).astype(str), "truth": y, "own": y, "own_p": weak, "own_right": y, "p_ik": weak,
            "p_ik/probe": weak, "p_ik/belief": 1 - y, "tau": np.full(8, 0.5),
            "p/weak": weak, "p/naive": naive, "p/ceiling": ceiling}
    transfer = part | {"weak": weak, "is_self": np.array([True] * 2 + [False] * 6), "refined": naive,
                       "smoothed_weak": naive, "label/naive": weak}
    return r.diagnose({"transfer": transfer, "test": part, "homophily": 0.5}, ("weak", "naive", "ceiling"))


def test_label_accuracy_by_source_on_routed_and_unrouted_items():
    d = diagnosed()
    assert d["coverage"] == 0.25 and d["label_accuracy"]["own"] == {"all": 1, "routed": 1, "unrouted": 1}
    close(d["label_accuracy"]["weak"]["all"], 4 / 8)
    close(d["label_accuracy"]["weak"]["routed"], 2 / 2)
    close(d["label_accuracy"]["weak"]["unrouted"], 2 / 6)
    close(d["label_accuracy"]["refined"]["unrouted"], 3 / 6)


def test_known_and_unknown_imitation_and_misfit_by_hand():
    naive = diagnosed()["methods"]["naive"]
    # wrong: 2 (.1, sure, weak .2 sure: imitates), 5 (.8, sure, weak .4 says no),
    # 6 (.9, sure, weak .8 sure: imitates)
    close(naive["confident_wrong_that_imitate_weak"], 2 / 3, 1e-7)
    close(naive["errors_strong_knew"], 2 / 3, 1e-7)         # 2 and 5
    close(naive["blind"], 1 / 2, 1e-7)      # of 2 and 5, which the ceiling gets right: weak doubts 5
    assert {key: row["n"] for key, row in naive["known"].items()} == {
        "known-strong known-weak": 3, "known-strong unknown-weak": 2,
        "unknown-strong known-weak": 3, "unknown-strong unknown-weak": 0}
    close(naive["known"]["known-strong known-weak"]["accuracy"], 2 / 3, 1e-7)       # 0 2 4: 2 is wrong
    assert naive["known"]["unknown-strong unknown-weak"]["accuracy"] is None
    gain = np.mean([.01 - .04, .16 - .01, .64 - .81, .81 - .16, .01 - .04, .16 - .64, .64 - .81, .81 - .16])
    misfit = np.mean([.01, .09, .01, .25, .01, .16, .01, .25])
    close(naive["gain"], gain, 1e-9)
    close(naive["misfit"], misfit, 1e-9)
    assert diagnosed()["methods"]["weak"]["misfit"] == 0


def test_every_router_is_diagnosed():
    routers = diagnosed()["routers"]
    assert set(routers) == {"probe", "belief"}
    assert routers["belief"]["test"] == {"auroc": 0.0, "brier": 1.0, "ece": 1.0}
    assert routers["belief"]["coverage"] == 0.5 and routers["probe"]["coverage"] == 0.5
    assert routers["probe"]["test"]["auroc"] == diagnosed()["p_ik"]["test"]["auroc"]


def test_the_two_views_of_the_supervisor_are_compared():
    def run(seen, real, n=1000):
        weak = np.r_[np.ones(round(real * n)), np.zeros(n - round(real * n))]
        return {"cross_fitted": seen, "cross_fitted_error": (seen * (1 - seen) / n) ** 0.5, "trained": True,
                "transfer": {"weak": weak, "truth": np.ones(n), "group": np.arange(n)}}
    view = r.supervisor_views([run(0.537, 0.731)])
    assert view["cross_fitted"] == 0.537 and view["actual"] == pytest.approx(0.731)
    se = (0.537 * 0.463 / 1000 + 0.731 * 0.269 / 1000) ** 0.5
    close(view["standard_errors"], (0.537 - 0.731) / se, 1e-6)
    one, four = (r.supervisor_views([run(0.7, 0.731)] * n)["standard_errors"] for n in (1, 4))
    close(four / one, 2, 1e-6)
    apart, together = run(0.537, 0.732), run(0.537, 0.732)
    together["transfer"]["group"] = np.arange(1000) // 4        # fours of one mind: as of a quarter as many
    se = [(0.537 * 0.463 / 1000 + times * 0.732 * 0.268 / 1000) ** 0.5 for times in (1, 4)]
    for one, error in zip((apart, together), se):
        close(r.supervisor_views([one])["standard_errors"], (0.537 - 0.732) / error, 1e-6)
    right = np.repeat([1, 0, 1, 1], 3)
    close(m.squared_error(right, np.arange(12)), 0.75 * 0.25 / 12, 1e-12)
    close(m.squared_error(right, np.arange(12) // 3), 0.75 * 0.25 / 4, 1e-12)


def test_risk_coverage_orders_by_p_ik():
    curve = diagnosed()["p_ik"]["test"]["risk_coverage"]
    assert curve[-1][0] == 1.0 and curve[-1][1] == pytest.approx(0.5)
    # the surest question: p .9, the first of two, is right
    assert curve[0][0] == 1 / 8 and curve[0][1] == 0.0
