"""Weak labels in, several supervisors, the related systems' labels, what a representation lacks.

Run: pytest tests/test_supervisors.py (40 s).
"""
import json
import random

import numpy as np
import pytest
import torch

import selw2s as s
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


# ---------------------------------------------------------------------------------------- several supervisors
@pytest.fixture(scope="module")
def three(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("three")
    return go(tiny, out, "--methods", "naive", "selective", *RECIPES, "--weak-seeds", "3"), out


@pytest.mark.slow
def test_with_one_supervisor_every_recipe_is_what_it_came_from(tiny, tmp_path):
    w = weights(go(tiny, tmp_path, "--methods", "naive", *RECIPES))
    assert w["ensemble"] == w["debate"] == w["raven"] == w["naive"]
    assert len({str(w[name]) for name in ("naive", "two-stage", "label-model")}) == 3


@pytest.mark.slow
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
    weak, strong = result["models"]["weak"], result["models"]["strong"]
    assert len(weak) == 2 and weak[1]["sha256"] == strong["sha256"] != weak[0]["sha256"]
    trained = [stage["name"] for stage in result["stages"] if stage["name"].startswith("weak")]
    assert trained == ["weak", "weak 2", "weak 3", "weak 4"]
    assert sum(stage["name"].startswith("cross-") for stage in result["stages"]) == 5  # the first one alone


@pytest.mark.slow
def test_the_work_ahead_foresees_every_stage_of_several_supervisors(tiny, tmp_path):
    from data.results.plan import ahead
    flags = ("--weak-seeds", "3", "--methods", "naive", *RECIPES)
    setup = set_up(tiny, tmp_path, *flags)
    names = {stage["name"] for stage in go(tiny, tmp_path, *flags)["stages"]}
    found = {"debate 1", "debate 2", "debate 3", "debate"}      # the ensemble's, without transcripts
    assert names - found == set(ahead(setup)) - found


# ------------------------------------------------------------------------------------------------ the recipes
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
    torch.testing.assert_close(rule(p, w, 0.5), torch.tensor([0.85, 0.45, 0.1]))    # started anew: the same
    ce = -(w * p[:, None].log() + (1 - w) * (1 - p[:, None]).log())
    weight = torch.tensor([0.5, 0.5]) - 1e-2 * torch.stack([ce[:, 0].mean(), ce[:2, 1].mean()])
    weight = weight / weight.sum()
    expected = torch.tensor([float(w[0] @ weight), float(w[1] @ weight), 0.1])
    assert abs(expected[1] - 0.45) > 1e-4
    torch.testing.assert_close(rule(p, w, 0.6), expected)


def test_silence_neither_wins_nor_loses_raven_a_supervisor():
    """The second says nothing for a hundred steps: its weight stays what it was."""
    rule, w = s.raven(), torch.tensor([[0.9, torch.nan], [0.3, torch.nan]])
    for step in range(100):
        rule(torch.tensor([0.5, 0.5]), w, 0.2 + step / 1000)
    both = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(rule(torch.tensor([0.5]), both, 0.9), torch.tensor([0.5]))


def test_raven_keeps_the_weights_of_equal_supervisors_equal():
    rule, g = s.raven(), torch.Generator().manual_seed(1)
    for step in range(50):
        w = torch.rand(16, generator=g)
        target = rule(torch.rand(16, generator=g), w[:, None].expand(16, 4), step / 50)
        torch.testing.assert_close(target, w)
    apart = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 1.0]])        # shows the weights
    torch.testing.assert_close(rule(torch.tensor([0.5, 0.5]), apart, 0.99), torch.tensor([0.25, 0.5]))


def test_raven_of_the_same_supervisor_twice_is_naive_bit_for_bit(tiny, tmp_path):
    twice = [*tiny[:4], tiny[3], *tiny[4:]]
    w = weights(go(twice, tmp_path, "--methods", "naive", "ensemble", "raven"))
    assert w["naive"] == w["ensemble"] == w["raven"]


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
        p, accuracies = s.label_model(said)
        z.append((accuracies - known) / (known * (1 - known) / (n * (1 - abstain))) ** 0.5)
    z = torch.stack(z)
    assert (z.abs() < 2).double().mean() > 0.9 and z.abs().max() < 3.5 and abs(z.mean()) < 0.3
    right = ((p > 0.5) == (truth > 0.5)).double().mean()
    assert right > ((said.nanmean(0) > 0.5) == (truth > 0.5)).double().mean() and right > 0.98
    sure = p > 0.99                             # calibrated: what it is sure of is right
    assert abs(float(truth[sure].mean() - p[sure].mean())) < 0.01


def test_label_model_is_the_posterior_of_its_own_accuracies():
    _, said = votes(5, (0.9, 0.7, 0.6), 500, 0.2)
    p, accuracies = s.label_model(said)
    for i in range(0, 500, 50):
        yes, no = 1.0, 1.0
        for vote, a in zip(said[:, i].tolist(), accuracies.tolist()):
            if vote == vote:
                yes *= a if vote else 1 - a
                no *= 1 - a if vote else a
        prior = float(p.double().mean())
        assert float(p[i]) == pytest.approx(prior * yes / (prior * yes + (1 - prior) * no), abs=1e-4)


# -------------------------------------------------------------------------------------------------- labels in
@pytest.mark.figures
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
    assert result["models"]["weak"] == [] and not any(
        stage["name"].startswith(("cross", "weak")) for stage in result["stages"])
    methods = result["metrics"]["methods"]
    assert methods["weak"]["accuracy"] is None and methods["naive"]["accuracy"] is not None
    assert all(row["pgr"] is None for row in methods.values()) and result["metrics"]["pgr_defined"] is None
    used = {name: row["ground_truth_labels"] for name, row in methods.items()}
    n = result["seeds"][0]["n"]["labelled"]
    assert {used[m] for m in ("naive", "ensemble", "raven", "two-stage", "label-model", "self-only")} == {0}
    assert {used[m] for m in ("selective", "graph-only", "fused", "strong-on-D_l")} == {n}
    line = next(x for x in s.table(result["metrics"]).splitlines() if x.startswith("weak "))
    assert line.split()[1] == "-"
    page = next(tmp_path.glob("*/*/report.html")).read_text("utf-8")
    assert "labels as they came" in page and "cross-fitted" not in page


def test_labels_of_d_l_are_taken_as_they_stand(tiny, tmp_path):
    argv, rows = annotated(tiny, tmp_path)
    prep, by_id = s.prepare(set_up(argv, tmp_path), 0), {row["id"]: row for row in rows}
    for item, p in zip(prep.labelled.items, prep.labelled.weak.tolist()):
        said = [x[item.option] for x in by_id[item.question_id]["weak"].values() if x]
        first = by_id[item.question_id]["weak"]["ann"]
        assert p == pytest.approx(first[item.option] if first else sum(said) / len(said))
    assert all(torch.equal(fold, prep.transfer.weak) for fold in prep.supervised.by_fold)
    assert prep.test.weak.isnan().all()


def test_the_order_of_supervisors_is_the_first_lines_whatever_becomes_of_it(tiny, tmp_path):
    """The first question may be left out later; the others name theirs in another order."""
    def turned(row, i):
        if i and row["split"] == "train":
            row["weak"] = dict(reversed(row["weak"].items()))
    argv, rows = annotated(tiny, tmp_path, turned)
    task = s.load_task(argv[1])
    assert [name for name, _ in task.train[5].weak] == ["ann", "bob", "cy"] != [*rows[5]["weak"]]
    for name, p in task.train[5].weak:
        assert p == (rows[5]["weak"][name] and tuple(rows[5]["weak"][name]))


@pytest.mark.slow
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
    assert alone["metrics"]["methods"]["weak"]["accuracy"] is not None
    assert alone["metrics"]["pgr_defined"] is not None
    data = arrays(alone, tmp_path / "c")
    said = [0.7 if item.endswith("/0") else 0.1 for item in data["seed0/test/id"]]
    np.testing.assert_allclose(data["seed0/test/p/weak"], said, atol=1e-6)


def test_yes_no_and_repeated_options_keep_their_probabilities(tmp_path):
    from data.jsonl import load
    rows = [{"question": f"is {i} red", "options": ["Yes", "no"], "answer": i % 2, "weak": [0.8, 0.2]}
            for i in range(40)]
    rows += [{"question": f"which {i}", "options": ["a", "b", "a ", "c"], "answer": 1,
              "weak": [0.1, 0.4, 0.2, 0.3]}
             for i in range(40)]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for q in load(str(file)).train:
        (name, p), = q.weak
        assert name == "weak" and p == pytest.approx((0.2, 0.8) if "red" in q.question else (0.3, 0.4, 0.3))


PROBABILITIES = "must be null or 4 probabilities, one per option, that sum to 1"


@pytest.mark.parametrize("weak, says", [
    ([0.5, 0.5], PROBABILITIES), ([0.2, 0.2, 0.2, 0.2], PROBABILITIES), ([2, -1, 0, 0], PROBABILITIES),
    ([1, 0, 0, "0"], PROBABILITIES), ([True, False, False, False], PROBABILITIES),
    (0.5, "must be list or dict"),
    ({"ann": [1, 0, 0, 0], "eve": None, "cy": None}, "by 'ann', 'cy', 'eve', not by 'ann', 'bob', 'cy'"),
    ({"ann": [1, 0, 0, 0]}, "by 'ann', not by"), ({}, "by nobody, not by"), (None, "by nobody, not by"),
    ({"ann": None, "bob": None, "cy": None}, "one supervisor must label"), ({"ann": {}}, PROBABILITIES),
    ([float("nan"), 1, 0, 0], PROBABILITIES), ([[1, 0, 0, 0]], PROBABILITIES), ([0] * 10 ** 5, PROBABILITIES),
    ({"a\nb": [1, 0, 0, 0]}, r"by 'a\nb', not by"), ({"": [1, 0, 0, 0]}, "by '', not by")])
def test_bad_weak_labels_are_named_with_file_and_line(tiny, tmp_path, capsys, weak, says):
    def spoil(row, i):
        if i == 4:
            row["weak"] = weak
    argv, _ = annotated(tiny, tmp_path, spoil)
    assert s.main([*argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{argv[1]}:5: " in error and says in error and error.count("\n") == 1 and len(error) < 500
    assert not (tmp_path / "out/task").exists()


def test_no_labels_and_no_weak_model_is_one_line(tiny, tmp_path, capsys):
    assert s.main([*tiny[:2], *tiny[4:], "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert 'needs --weak MODEL, or "weak" labels' in error and error.count("\n") == 1


@pytest.mark.slow
def test_poisoned_truth_with_labels_of_a_file_moves_the_ceiling_alone(tiny, tmp_path, monkeypatch):
    """Items and questions of D_u and test get other answers, the file's labels stay: nothing else moves."""
    argv, _ = annotated(tiny, tmp_path)
    methods = ("--methods", *(m for m in s.METHODS if m != "oracle"))
    clean, task = go(argv, tmp_path / "clean", *methods), s.load_task(argv[1])
    drawn = s.items(task.train, protocol="paper", seed=0)
    _, transfer = s.halves(drawn, task.train, protocol="paper", seed=0)
    hidden, real = {item.question_id for item in transfer} | {q.id for q in task.test}, s.items
    by_id = {q.id: q for q in task.train + task.test}

    def items(questions, **how):
        drawn = real([by_id[q.id] for q in questions], **how)
        return [item._replace(label=1 - item.label) if item.question_id in hidden else item for item in drawn]

    def poisoned(questions):
        return [q._replace(answer=(q.answer + 1) % 4) if q.id in hidden else q for q in questions]
    monkeypatch.setattr(s, "items", items)
    monkeypatch.setattr(s, "load_task", lambda *a, **k: task._replace(
        train=poisoned(task.train), test=poisoned(task.test)))
    a, b = weights(clean), weights(go(argv, tmp_path / "dirty", *methods))
    assert {name for name in a if a[name] != b[name]} == {"ceiling"} and "raven" in a


@pytest.mark.parametrize("flags", [("--shots", "2"), *(
    pytest.param(case, marks=pytest.mark.slow) for case in (
        ("--protocol", "openai"), ("--student", "answer"), ("--tune", "head"), ("--tune", "lora"),
        ("--own", "judge"), ("--folds", "3"), ("--analysis", "difficulty"), ("--seeds", "0", "1")))])
def test_labels_of_a_file_go_with_every_flag(tiny, tmp_path, flags):
    """Hard votes of one annotator who never abstains, as integers."""
    def vote(row, i):
        if row["split"] == "train":
            row["weak"] = [int(j == (row["answer"] + (i % 4 == 0)) % 4) for j in range(4)]
    argv, _ = annotated(tiny, tmp_path, vote)
    result = go(argv, tmp_path, "--methods", "naive", "self-only", "ensemble", "raven", *flags)
    data = arrays(result, tmp_path)
    assert result["seeds"][0]["supervisors"] == ["weak"]
    assert set(data["seed0/transfer/weak"].tolist()) == {0.0, 1.0}
    w = weights(result)
    assert w["naive"] == w["ensemble"] == w["raven"] != w["self-only"]


def test_a_yes_no_task_with_votes_runs(tiny, tmp_path):
    rows = [{"question": f"is thing {i} red", "options": ["yes", "no"], "answer": i % 3 % 2, "id": f"q{i}",
             "split": "train" if i < 60 else "test", "weak": [i % 2, 1 - i % 2]} for i in range(90)]
    file = tmp_path / "yesno.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = go(["--task", str(file), *tiny[4:]], tmp_path, "--methods", "naive")
    data = arrays(result, tmp_path)
    for part in ("transfer", "test"):
        said = [int(item[1:].split("/")[0]) % 2 for item in data[f"seed0/{part}/id"]]
        assert said == data[f"seed0/{part}/p/weak"].tolist()


@pytest.mark.slow
def test_merge_and_rerun_know_a_files_labels(tiny, tmp_path, capsys):
    argv, _ = annotated(tiny, tmp_path)
    flags = ("--methods", "naive", "two-stage")
    both = go(argv, tmp_path / "both", *flags, "--seeds", "0", "1")
    for seed in "01":
        go(argv, tmp_path / seed, *flags, "--seeds", seed)
    files = [str(next((tmp_path / seed).glob("*/*/result.json"))) for seed in "01"]
    assert s.main(["--merge", *files, "--out", str(tmp_path / "merged")]) == 0
    merged = json.loads(next((tmp_path / "merged").glob("*/*/result.json")).read_text("utf-8"))
    assert merged["metrics"] == json.loads(json.dumps(both["metrics"]))
    assert s.main(["--rerun", files[0], "--out", str(tmp_path / "again")]) == 0
    assert "the same as" in capsys.readouterr().out
    old = json.loads(open(files[0], encoding="utf-8").read())
    (tmp_path / "old.json").write_text(json.dumps(old | {"schema": 2}))
    assert s.main(["--rerun", str(tmp_path / "old.json")]) == 2
    assert "schema 2, this program's is 3" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--keep", "weak"), ("--analysis", "representation")])
def test_what_needs_a_weak_model_says_so(tiny, tmp_path, capsys, flags):
    argv, _ = annotated(tiny, tmp_path)
    assert s.main([*argv, "--out", str(tmp_path / "out"), "--methods", "weak", *flags]) == 2
    assert capsys.readouterr().err == "selw2s: --keep weak and --analysis representation need --weak MODEL\n"


def test_titles_are_given_once():
    assert s.titled(["m", "m", "m", "c", "c"]) == ["m", "m #2", "m #3", "c", "c #2"]
    assert s.titled(["m", "m #2", "m"]) == ["m", "m #2", "m #3"]
    assert s.titled(["m", "m", "m #2", "m #2"]) == ["m", "m #2", "m #2 #2", "m #2 #3"]


@pytest.mark.slow
# ----------------------------------------------------------------------------------------------------- debate
def test_every_supervisor_reads_its_own_transcript(tiny, tmp_path, monkeypatch):
    from data.results.plan import ahead

    def debated(row, i):
        row["transcripts"] = [f"pro {i}", f"con {i}"]
    argv, rows = annotated(tiny, tmp_path, debated, names=())
    argv = [*argv, *tiny[2:4], "--weak-seeds", "2"]
    seen, real = [], s.finetuned

    def spy(name, setup, start, inputs, targets, ask, seed, rule=None):
        seen.append((name, seed, inputs))
        return real(name, setup, start, inputs, targets, ask, seed, rule)
    setup = set_up(argv, tmp_path, "--methods", "ensemble", "debate")
    prep, tokenizer = s.prepare(setup, 0), setup.supervisors[0].model.tokenizer
    monkeypatch.setattr(s, "finetuned", spy)
    labels = s.debate(setup, prep)
    place = {row["id"]: i for i, row in enumerate(rows)}
    for (name, seed, inputs), word, number in zip(seen, ("pro", "con"), (0, 1)):
        assert seed == 1000 * number and name == f"debate {number + 1}"
        texts = [f"{word} {place[item.question_id]}\n{item.text}" for item in prep.labelled.items]
        assert inputs == tokenizer.encode(texts)
    assert (labels != prep.supervised.every).any(1).all() and labels.shape == prep.supervised.every.shape
    result = go(argv, tmp_path / "run", "--methods", "ensemble", "debate")
    assert weights(result)["ensemble"] != weights(result)["debate"]
    head = ("--tune", "head", "--methods", "ensemble", "debate")    # trained on states, which no plan has
    stages = go(argv, tmp_path / "head", *head)["stages"]
    assert {stage["name"] for stage in stages} == set(ahead(set_up(argv, tmp_path, *head)))


def test_a_transcript_over_the_context_is_one_line(tiny, tmp_path, capsys):
    def long(row, i):
        row["transcripts"] = ["word " * (400 if i == 9 else 2)]
    argv, _ = annotated(tiny, tmp_path, long, names=())
    assert s.main([*argv, *tiny[2:4], "--out", str(tmp_path / "out"), "--methods", "debate"]) == 2
    error = capsys.readouterr().err
    assert "question q9: with its transcript for weak it has" in error and error.count("\n") == 1


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


# --------------------------------------------------------------------------------------------- representation
@pytest.mark.parametrize("n, c_s, c_w", [(40, 7, 5), (12, 30, 20)])
def test_what_a_representation_lacks_is_the_dense_formula(n, c_s, c_w):
    g = torch.Generator().manual_seed(n)
    strong, weak = (torch.randn(n, c, generator=g) @ torch.diag(torch.linspace(0.1, 3, c)) + 1
                    for c in (c_s, c_w))
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


@pytest.mark.slow
@pytest.mark.figures
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
