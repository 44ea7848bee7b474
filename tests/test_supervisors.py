"""Weak labels in, several supervisors, the related systems' labels, what a representation lacks.

Run: pytest tests/test_supervisors.py (40 s).
"""
import json
import random

import numpy as np
import pytest
import torch

import selw2s as s
from data import DataError
from data.results.analyses import lacking
from test_run import arrays, go, set_up, weights

RECIPES = ("ensemble", "raven", "two-stage", "label-model", "debate")


def votes(seed, accuracies, n, abstain=0.0):
    """Truth (n,) and votes (V, n) of independent voters; NaN where one abstains."""
    g = torch.Generator().manual_seed(seed)
    truth = (torch.rand(n, generator=g) < 0.5).float()
    right = torch.rand(len(accuracies), n, generator=g) < torch.tensor(accuracies)[:, None]
    out = torch.where(right, truth, 1 - truth)
    return truth, out.masked_fill(torch.rand(out.shape, generator=g) < abstain, torch.nan)


def annotated(tiny, folder, edit=None, names=("ann", "bob", "cy")):
    """The tiny task with three annotators on its training lines, each right in four of five, who abstain in
    one of four; edit(row, i) changes a row."""
    rng, rows = random.Random(3), []
    for i, row in enumerate(map(json.loads, open(tiny[1], encoding="utf-8"))):
        if row["split"] == "train":
            row["weak"] = {}
            for name in names:
                place = row["answer"] if rng.random() < 0.8 else rng.randrange(4)
                row["weak"][name] = [int(j == place) for j in range(4)] if rng.random() < 0.75 else None
            if names and not any(row["weak"].values()):
                row["weak"][names[1]] = [0.1, 0.2, 0.3, 0.4]
        if edit:
            edit(row, i)
        rows.append(row)
    file = folder / "task.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--task", str(file), *tiny[4:]], rows     # without --weak


# ------------------------------------------------------------------------------------------ several supervisors
@pytest.fixture(scope="module")
def three(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("three")
    return go(tiny, out, "--methods", "naive", "selective", *RECIPES, "--weak-seeds", "3"), out


def test_with_one_supervisor_every_recipe_is_what_it_came_from(tiny, tmp_path):
    w = weights(go(tiny, tmp_path, "--methods", "naive", *RECIPES))
    assert w["ensemble"] == w["debate"] == w["raven"] == w["naive"]
    assert len({str(w[name]) for name in ("naive", "two-stage", "label-model")}) == 3


def test_more_supervisors_leave_the_first_ones_methods_as_they_are(three, tiny, tmp_path):
    many, one = weights(three[0]), weights(go(tiny, tmp_path, "--methods", "naive", "selective"))
    for name in ("weak", "zero-shot", "naive", "selective"):
        assert many[name] == one[name]
    assert len({many[name][0] for name in ("naive", "ensemble", "raven", "two-stage", "label-model")}) == 5
    assert many["debate"] == many["ensemble"]           # no transcripts


def test_the_ensemble_is_the_mean_of_all_and_every_supervisor_stands_in_the_files(three):
    result, out = three
    data = arrays(result, out)
    every = np.stack([data[f"seed0/transfer/weak/{i}"] for i in range(3)])
    assert (every[0] != every[1]).any() and (every[1] != every[2]).any()
    np.testing.assert_array_equal(every[0], data["seed0/transfer/weak"])
    np.testing.assert_allclose(data["seed0/transfer/label/ensemble"], every.mean(0), atol=1e-7)
    assert result["seeds"][0]["supervisors"] == ["weak", "weak #2", "weak #3"]
    truth, shares = data["seed0/transfer/truth"], result["seeds"][0]["diagnostics"]["label_accuracy"]
    for i in range(3):
        assert shares[f"weak/{i}"]["all"] == pytest.approx(((every[i] > 0.5) == (truth > 0.5)).mean())
    rows = [json.loads(line) for line in next(out.glob("*/*/labels.jsonl")).read_text("utf-8").splitlines()]
    assert np.array_equal(np.array([list(row["weak"].values()) for row in rows], np.float32).T, every)
    assert list(rows[0]["weak"]) == ["weak", "weak #2", "weak #3"]


def test_several_models_are_several_supervisors_each_with_its_seeds(tiny, tmp_path):
    flags = [*tiny[:3], tiny[3], tiny[5], *tiny[4:], "--weak-seeds", "2", "--methods", "weak"]
    result = go(flags, tmp_path)
    assert result["seeds"][0]["supervisors"] == ["weak", "weak #2", "strong", "strong #2"]
    assert list(result["models"]) == ["weak", "weak 2", "strong"]
    trained = [stage["name"] for stage in result["stages"] if stage["name"].startswith("weak")]
    assert trained == ["weak", "weak 2", "weak 3", "weak 4"]
    assert sum(stage["name"].startswith("cross-") for stage in result["stages"]) == 5      # the first one alone


def test_the_work_ahead_foresees_every_stage_of_several_supervisors(tiny, tmp_path):
    from data.results.work import ahead
    flags = ("--weak-seeds", "3", "--methods", "naive", *RECIPES)
    setup = set_up(tiny, tmp_path, *flags)
    names = {stage["name"] for stage in go(tiny, tmp_path, *flags)["stages"]}
    found = {"debate 1", "debate 2", "debate 3", "debate"}      # the ensemble's, where there are no transcripts
    assert names - found == set(ahead(setup)) - found


# -------------------------------------------------------------------------------------------------- the recipes
def test_raven_forgets_a_supervisor_of_noise():
    """Students that learn the truth: two good supervisors, one of noise."""
    g, rule, shares = torch.Generator().manual_seed(0), s.raven(), []
    for step in range(400):
        truth, w = votes(step, (0.9, 0.9, 0.5), 32)
        p = (0.5 + (truth - 0.5) * 0.8 * torch.rand(32, generator=g)).clamp(0.05, 0.95)
        target = rule(p, w.T, step / 400)
        if step >= 40:
            lone = (w[0] == w[1]) & (w[2] != w[0])
            shares.append((target[lone] - w[0][lone]).abs().mean())       # weight of the third
    assert shares[0] == pytest.approx(1 / 3, abs=1e-6) and shares[-1] < 0.05
    assert all(b <= a + 1e-6 for a, b in zip(shares[::60], shares[60::60]))


def test_raven_by_hand():
    rule, w = s.raven(), torch.tensor([[0.9, 0.8], [0.2, 0.7], [0.1, torch.nan]])
    p = torch.tensor([0.6, 0.3, 0.4])
    start = rule(p, w, 0.0)                         # equal weights; the second item's supervisors differ
    torch.testing.assert_close(start, torch.tensor([0.85, 0.3, 0.1]))
    torch.testing.assert_close(rule(p, w, 0.5), torch.tensor([0.85, 0.45, 0.1]))
    weight = torch.tensor([0.5, 0.5])               # and now they have moved once
    ce = -(w * p[:, None].log() + (1 - w) * (1 - p[:, None]).log())
    weight = weight - 1e-2 * torch.stack([ce[:, 0].mean(), ce[:2, 1].mean()])
    weight = weight / weight.sum()
    again = rule(p, w, 0.5)                         # the same step started anew: not moved again
    torch.testing.assert_close(again, torch.tensor([float(w[0] @ weight), float(w[1] @ weight), 0.1]))
    torch.testing.assert_close(rule(p, w, 0.6), again)


def test_raven_with_equal_supervisors_is_naive():
    rule, g = s.raven(), torch.Generator().manual_seed(1)
    for step in range(50):
        w = torch.rand(16, generator=g)
        target = rule(torch.rand(16, generator=g), w[:, None].expand(16, 4), step / 50)
        torch.testing.assert_close(target, w)


def test_two_stage_by_hand_and_keep_all_is_naive(tiny, tmp_path, monkeypatch):
    setup = set_up(tiny, tmp_path)
    prep = s.prepare(setup, 0)
    weak = prep.transfer.weak
    assert torch.equal(s.two_stage(setup, prep, share=1.0), weak)
    asked, p = [], torch.linspace(0, 1, len(weak))

    def relabel(name, setup, start, inputs, targets, ask, seed, rule=None):
        asked.append((inputs, targets, ask))
        return s.Outcome([p[:len(ask[0])]], "w")
    monkeypatch.setattr(s, "finetuned", relabel)
    labels = s.two_stage(setup, prep)
    first = s.surer(weak)
    (inputs, targets, ask), = asked
    rows = [i for i in range(len(weak)) if first[i]]
    assert inputs == [prep.transfer.inputs[i] for i in rows] and torch.equal(targets, weak[first])
    assert ask == [[x for i, x in enumerate(prep.transfer.inputs) if i not in rows]]
    assert torch.equal(labels[first], weak[first])
    said = p[:len(ask[0])]
    expected = torch.where((said >= 0.75) | (said <= 0.25), said, torch.nan)
    torch.testing.assert_close(labels[~first], expected, equal_nan=True)


def test_surer_half_is_balanced_and_by_confidence():
    labels = torch.tensor([0.9, 0.6, 0.7, 0.1, 0.45, 0.8, 0.3])
    assert s.surer(labels).tolist() == [True, False, False, True, False, True, True]
    assert s.surer(labels, 1.0).all()


@pytest.mark.parametrize("abstain", [0.0, 0.2])
def test_label_model_finds_known_accuracies_within_two_standard_errors(abstain):
    """Of a share seen on so many votes; five draws, nine voters: 45 deviations in standard errors."""
    known, n, z = torch.tensor((0.9, 0.85, 0.8, 0.85, 0.9, 0.75, 0.8, 0.85, 0.7)), 4000, []
    for seed in range(5):
        truth, said = votes(seed, known.tolist(), n, abstain)
        found = s.label_model(said)
        z.append((found.accuracy - known) / (known * (1 - known) / (n * (1 - abstain))) ** 0.5)
    z = torch.stack(z)
    assert (z.abs() < 2).double().mean() > 0.9 and z.abs().max() < 3.5 and abs(z.mean()) < 0.3
    right = ((found.p > 0.5) == (truth > 0.5)).double().mean()
    assert right > ((said.nanmean(0) > 0.5) == (truth > 0.5)).double().mean() and right > 0.98
    sure = found.p > 0.99                       # calibrated: what it is sure of is right
    assert abs(float(truth[sure].mean() - found.p[sure].mean())) < 0.01


def test_label_model_is_the_posterior_of_its_own_accuracies():
    _, said = votes(5, (0.9, 0.7, 0.6), 500, 0.2)
    found = s.label_model(said)
    for i in range(0, 500, 50):
        yes, no = 1.0, 1.0
        for vote, a in zip(said[:, i].tolist(), found.accuracy.tolist()):
            if vote == vote:
                yes *= a if vote else 1 - a
                no *= 1 - a if vote else a
        prior = float(found.p.double().mean())
        assert float(found.p[i]) == pytest.approx(prior * yes / (prior * yes + (1 - prior) * no), abs=1e-4)


# ----------------------------------------------------------------------------------------------------- labels in
def test_labels_of_annotators_need_no_weak_model(tiny, tmp_path):
    argv, rows = annotated(tiny, tmp_path)
    result = go(argv, tmp_path, "--methods", "all")
    data, by_id = arrays(result, tmp_path), {row["id"]: row for row in rows}
    for i, name in enumerate(("ann", "bob", "cy")):
        for item, p in zip(data["seed0/transfer/id"], data[f"seed0/transfer/weak/{i}"]):
            question, place = item.rsplit("/", 1)
            said = by_id[question]["weak"][name]
            assert np.isnan(p) if said is None else p == np.float32(said[int(place)])
    every = np.stack([data[f"seed0/transfer/weak/{i}"] for i in range(3)])
    assert np.isnan(every).any() and not np.isnan(data["seed0/transfer/weak"]).any()
    expected = np.where(np.isnan(every[0]), np.nanmean(every, 0), every[0])
    np.testing.assert_allclose(data["seed0/transfer/weak"], expected, atol=1e-7)
    np.testing.assert_allclose(data["seed0/transfer/label/ensemble"], np.nanmean(every, 0), atol=1e-7)
    assert list(result["models"]) == ["strong"] and not any(
        stage["name"].startswith(("cross", "weak")) for stage in result["stages"])
    methods = result["metrics"]["methods"]
    assert methods["weak"]["accuracy"] is None and methods["naive"]["accuracy"] > 0.3
    assert all(row["pgr"] is None for row in methods.values()) and result["metrics"]["pgr_defined"] is None
    used = {name: row["ground_truth_labels"] for name, row in methods.items()}
    n = result["seeds"][0]["n"]["labelled"]
    assert {used[m] for m in ("naive", "ensemble", "raven", "two-stage", "label-model", "self-only")} == {0}
    assert {used[m] for m in ("selective", "graph-only", "fused", "strong-on-D_l")} == {n}
    line = next(x for x in s.table(result["metrics"]).splitlines() if x.startswith("weak "))
    assert line.split()[1] == "-"
    page = next(tmp_path.glob("*/*/report.html")).read_text("utf-8")
    assert "labels as they came" in page


def test_labels_of_d_l_are_taken_as_they_stand(tiny, tmp_path):
    argv, rows = annotated(tiny, tmp_path)
    prep, by_id = s.prepare(set_up(argv, tmp_path), 0), {row["id"]: row for row in rows}
    for item, p in zip(prep.labelled.items, prep.labelled.weak.tolist()):
        said = [x[item.option] for x in by_id[item.question_id]["weak"].values() if x]
        first = by_id[item.question_id]["weak"]["ann"]
        assert p == pytest.approx(first[item.option] if first else sum(said) / len(said))
    assert all(torch.equal(fold, prep.transfer.weak) for fold in prep.weak.by_fold)
    assert prep.test.weak.isnan().all()


def test_models_come_before_a_files_labels_and_test_labels_count(tiny, tmp_path):
    def of_test(row, i):
        if row["split"] == "test":
            row["weak"] = {name: [0.7, 0.1, 0.1, 0.1] for name in ("ann", "bob", "cy")}
    argv, rows = annotated(tiny, tmp_path, of_test)
    both = go([*argv, *tiny[2:4]], tmp_path / "a", "--methods", "naive", "ensemble")
    plain = go([*tiny], tmp_path / "b", "--methods", "naive")
    assert both["seeds"][0]["supervisors"] == ["weak", "ann", "bob", "cy"]
    assert weights(both)["naive"] == weights(plain)["naive"] != weights(both)["ensemble"]
    alone = go(argv, tmp_path / "c", "--methods", "naive", "ceiling")
    share = np.mean([item.endswith("/0") for item in arrays(alone, tmp_path / "c")["seed0/test/id"]])
    assert alone["metrics"]["methods"]["weak"]["accuracy"] is not None and 0 < share < 1
    assert alone["metrics"]["pgr_defined"] is not None


def test_yes_no_and_repeated_options_keep_their_probabilities(tmp_path):
    from data.jsonl import load
    rows = [{"question": f"is {i} red", "options": ["Yes", "no"], "answer": i % 2, "weak": [0.8, 0.2]}
            for i in range(40)]
    rows += [{"question": f"which {i}", "options": ["a", "b", "a ", "c"], "answer": 1, "weak": [0.1, 0.4, 0.2, 0.3]}
             for i in range(40)]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for q in load(str(file)).train:
        (name, p), = q.weak
        assert name == "weak" and p == pytest.approx((0.2, 0.8) if "red" in q.question else (0.3, 0.4, 0.3))


PROBABILITIES = "must be null or 4 probabilities, one per option, that sum to 1"


@pytest.mark.parametrize("weak, says", [
    ([0.5, 0.5], PROBABILITIES), ([0.2, 0.2, 0.2, 0.2], PROBABILITIES), ([2, -1, 0, 0], PROBABILITIES),
    ([1, 0, 0, "0"], PROBABILITIES), ([True, False, False, False], PROBABILITIES), (0.5, "must be list or dict"),
    ({"ann": [1, 0, 0, 0], "eve": None, "cy": None}, "by ann, cy, eve, not by ann, bob, cy"),
    ({"ann": [1, 0, 0, 0]}, "by ann, not by"), ({}, "by nobody, not by"), (None, "by nobody, not by"),
    ({"ann": None, "bob": None, "cy": None}, "one supervisor must label"), ({"ann": {}}, PROBABILITIES)])
def test_bad_weak_labels_are_named_with_file_and_line(tiny, tmp_path, capsys, weak, says):
    def spoil(row, i):
        if i == 4:
            row["weak"] = weak
    argv, _ = annotated(tiny, tmp_path, spoil)
    assert s.main([*argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{argv[1]}:5: " in error and says in error and error.count("\n") == 1
    assert not (tmp_path / "out/task").exists()


def test_no_labels_and_no_weak_model_is_one_line(tiny, tmp_path, capsys):
    assert s.main([*tiny[:2], *tiny[4:], "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert 'needs --weak MODEL, or "weak" labels' in error and error.count("\n") == 1


def test_poisoned_truth_with_labels_of_a_file_moves_the_ceiling_alone(tiny, tmp_path):
    """Answers of D_u and test turned in the file, labels as they were: no other weight changes."""
    argv, rows = annotated(tiny, tmp_path)
    methods = ("--methods", *(m for m in s.METHODS if m != "oracle"), "--limit", "0")
    task = s.load_task(argv[1])
    drawn = s.items(task.train, protocol="paper", seed=0)
    labelled, transfer = s.halves(drawn, task.train, protocol="paper", seed=0)
    prep = s.prepare(set_up(argv, tmp_path / "p"), 0)
    turned = prep._replace(**{name: getattr(prep, name)._replace(
        items=[item._replace(label=1 - item.label) for item in getattr(prep, name).items])
        for name in ("transfer", "test")})
    setup = set_up(argv, tmp_path / "p", *methods)
    known = s.know(setup.config, prep, "probe")
    for method in setup.config.methods[2:]:
        a, b = (s.student(method, setup, some, known, s.select(setup.config, some, known.learn, known.transfer))
                for some in (prep, turned))
        assert (a.weights == b.weights) == (method != "ceiling"), method


# -------------------------------------------------------------------------------------------------------- debate
def test_every_supervisor_reads_its_own_transcript(tiny, tmp_path, monkeypatch):
    def debated(row, i):
        row["transcripts"] = [f"pro {i}", f"con {i}"]
    argv, rows = annotated(tiny, tmp_path, debated, names=())
    argv = [*argv, *tiny[2:4], "--weak-seeds", "2"]
    seen, real = [], s.finetuned

    def spy(name, setup, start, inputs, targets, ask, seed, rule=None):
        seen.append((name, seed, inputs))
        return real(name, setup, start, inputs, targets, ask, seed, rule)
    setup = set_up(argv, tmp_path, "--methods", "ensemble", "debate")
    prep, tokenizer = s.prepare(setup, 0), setup.weak[0].tokenizer
    monkeypatch.setattr(s, "finetuned", spy)
    labels = s.debate(setup, prep)
    place = {row["id"]: i for i, row in enumerate(rows)}
    for (name, seed, inputs), word, number in zip(seen, ("pro", "con"), (0, 1)):
        assert seed == 1000 * number and name == f"debate {number + 1}"
        texts = [f"{word} {place[item.question_id]}\n{item.text}" for item in prep.labelled.items]
        assert inputs == tokenizer.encode(texts)
    assert (labels != prep.weak.every).any(1).all() and labels.shape == prep.weak.every.shape
    result = go(argv, tmp_path / "run", "--methods", "ensemble", "debate")
    assert weights(result)["ensemble"] != weights(result)["debate"]


def test_transcripts_that_are_not_one_per_supervisor_are_refused(tiny, tmp_path, capsys):
    def debated(row, i):
        row["transcripts"] = ["one"] if i == 7 else ["one", "two"]
    argv, _ = annotated(tiny, tmp_path, debated)
    assert s.main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert ':8: 1 "transcripts", not 2' in capsys.readouterr().err

    def even(row, i):
        row["transcripts"] = ["one", "two"]
    argv, _ = annotated(tiny, tmp_path, even)
    argv += [*tiny[2:4], "--out", str(tmp_path / "out"), "--methods"]
    assert s.main([*argv, "debate"]) == 2
    assert "2 transcripts a question for 1 supervisors" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ representation
@pytest.mark.parametrize("n, c_s, c_w", [(40, 7, 5), (12, 30, 20)])
def test_what_a_representation_lacks_is_the_dense_formula(n, c_s, c_w):
    g = torch.Generator().manual_seed(n)
    strong, weak = (torch.randn(n, c, generator=g) @ torch.diag(torch.linspace(0.1, 3, c)) + 1 for c in (c_s, c_w))
    y = (torch.rand(n, generator=g) < 0.5).float()

    def dense(x, ridge=0.1):
        x = x.double() - x.double().mean(0)
        K = x @ x.T / n
        return K @ torch.linalg.inv(K + ridge * K.trace() / n * torch.eye(n))
    # the ridge is r = 0.1 tr(K) / n for the n x n K, whose trace is that of the covariance
    inner = dense(strong) @ (torch.eye(n) - dense(weak))
    centred = y.double() - y.double().mean()
    norm, error = lacking(strong, weak, y)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(inner, 2)), rel=1e-6)
    assert error == pytest.approx(float((inner @ centred).norm() ** 2 / n), rel=1e-6)
    assert lacking(strong, strong, y)[1] < error


def test_representation_compares_weak_models(tiny, tmp_path):
    flags = [*tiny[:3], tiny[3], tiny[5], *tiny[4:]]
    result = go(flags, tmp_path, "--methods", "weak", "--analysis", "representation", "--seeds", "0", "1")
    assert list(result["analysis"]) == ["weak", "strong"]
    for rows in result["analysis"].values():
        assert [row["seed"] for row in rows] == [0, 1]
        assert all(0 <= row["norm"] <= 1 and row["predicted_error"] >= 0 for row in rows)
    # the strong model lacks nothing of itself: only the ridge is left
    assert (np.mean([row["predicted_error"] for row in result["analysis"]["strong"]])
            < np.mean([row["predicted_error"] for row in result["analysis"]["weak"]]))
    assert (next(tmp_path.glob("*/*/result.json")).parent / "analysis.svg").exists()
