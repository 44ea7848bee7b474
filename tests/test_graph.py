"""graph.py against dense float64 oracles: brute-force neighbours, a dense solve of I - alpha S, properties.

    python -m pytest tests/test_graph.py        10 seconds on two cores; no network; needs no GPU
"""
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

import graph

GOLDEN = Path(__file__).parent / "golden" / "graph.safetensors"
several = settings(max_examples=150, deadline=None, derandomize=True)
ATOL = 2e-6     # float32 rounding of a similarity of at most 1, twice over


def rng(seed):
    return torch.Generator().manual_seed(seed)


def brute_force(x, q):
    """All similarities (Q, N), float64, by the definition."""
    x, q = x.double(), q.double()
    return (q @ x.T / (q.norm(dim=1)[:, None] * x.norm(dim=1))).nan_to_num(0)   # a zero row is at 0


def check_neighbours(x, k, index, similarity, queries=None):
    truth = brute_force(x, x if queries is None else queries)
    if queries is None:
        truth.fill_diagonal_(-torch.inf)
    k = min(k, len(x) - (queries is None))
    assert index.shape == similarity.shape == (len(truth), k) and index.dtype == torch.int64
    if k == 0:
        return
    assert all(len(set(row)) == k for row in index.tolist())
    torch.testing.assert_close(similarity.double(), truth.gather(1, index), rtol=0, atol=ATOL)  # never self
    torch.testing.assert_close(similarity.double(), truth.topk(k).values, rtol=0, atol=ATOL)    # none missed
    assert (similarity[:, 1:] <= similarity[:, :-1]).all()
    tied = similarity[:, 1:] == similarity[:, :-1]
    assert (index[:, 1:] > index[:, :-1])[tied].all()


@st.composite
def features(draw, least=1, most=70):
    """Gaussian rows, some repeated, some zero, some far from the rest."""
    n, d = draw(st.integers(least, most)), draw(st.sampled_from([1, 2, 3, 7, 19]))
    g = rng(draw(st.integers(0, 2**31)))
    x = torch.randn(n, d, generator=g) + draw(st.sampled_from([0.0, 3.0]))
    twins = draw(st.integers(0, n))
    x[torch.randint(n, (twins,), generator=g)] = x[torch.randint(n, (twins,), generator=g)]
    if draw(st.booleans()):
        x[torch.randint(n, (2,), generator=g)] = 0
    if draw(st.booleans()):
        x[torch.randint(n, (1,), generator=g)] *= 1e3
    return x


# ------------------------------------------------------------------------------------------------ neighbours

@several
@given(features(), st.integers(1, 80), st.sampled_from([1, 32, 2048]),
       st.sampled_from([torch.float32, torch.bfloat16]))
def test_neighbours_are_brute_force(x, k, block, tile):
    check_neighbours(x, k, *graph.knn(x, k, block=block, tile=tile))


@several
@given(features(), features(), st.integers(1, 80), st.sampled_from([16, 2048]))
def test_neighbours_of_queries(x, q, k, block):
    q = torch.cat((q.repeat(1, x.shape[1])[:, :x.shape[1]], x[:3]))     # rows of x are not excluded
    check_neighbours(x, k, *graph.knn(x, k, queries=q, block=block), q)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("k", [5, 90])
@pytest.mark.parametrize("block", [16, 144, 1024])
@pytest.mark.parametrize("tile, atol", [(torch.float32, ATOL), (torch.bfloat16, 4e-3)])
def test_the_shortlist_is_complete(own, k, block, tile, atol):
    """What the tiles alone must deliver: _settle would repair a bad shortlist, at many times the cost."""
    v = graph._unit(torch.randn(601, 19, generator=rng(601)))
    u = v if own else graph._unit(torch.randn(233, 19, generator=rng(233)))
    index, similarity, bound = graph._shortlist(u, v, k, block, tile)
    truth = u @ v.T
    if own:
        truth.fill_diagonal_(-torch.inf)
    assert index.shape[1] > k and all(len(set(row)) == len(row) for row in index.tolist())
    torch.testing.assert_close(truth.gather(1, index), similarity.double(), rtol=0, atol=atol)
    assert (truth.scatter(1, index, -torch.inf) <= bound[:, None] + atol).all()
    assert (truth.topk(k).values[:, -1] > bound + atol).float().mean() > 0.98       # few rows are done twice


@pytest.mark.parametrize("kind", ["random", "clusters", "sorted", "lattice"])
def test_no_block_changes_a_bit(kind):
    """Clusters tighter than float32 tiles resolve, an order in which later blocks are nearer, many ties."""
    g, N = rng(3), 331
    centres = torch.randn(7, 11, generator=g)[torch.randint(7, (N,), generator=g)]
    x = {"random": torch.randn(N, 11, generator=g),
         "clusters": centres + 1e-4 * torch.randn(N, 11, generator=g),
         "sorted": torch.linspace(1, 2, N)[:, None] ** torch.arange(5),
         "lattice": torch.randint(-1, 2, (N, 4), generator=g).float()}[kind]
    want = graph.knn(x, 13, block=16)
    check_neighbours(x, 13, *want)
    for block in (50, 160, 2048):
        for tile in (torch.float32, torch.float64):
            got = graph.knn(x, 13, block=block, tile=tile)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_ties_go_to_the_lower_index():
    """+-1 vectors of length 16: products are exact, so ties are, and a stable sort is the truth."""
    x = torch.randint(0, 2, (200, 16), generator=rng(0)) * 2 - 1
    truth = (x @ x.T).fill_diagonal_(-99).sort(dim=1, descending=True, stable=True)
    for block in (16, 64, 2048):
        index, similarity = graph.knn(x, 23, block=block)
        assert torch.equal(index, truth.indices[:, :23])
        assert torch.equal(similarity, truth.values[:, :23] / 16)
    index, _ = graph.knn(torch.ones(100, 3), 5, block=16)       # more twins than any shortlist holds
    assert index[0].tolist() == [1, 2, 3, 4, 5] and index[3].tolist() == [0, 1, 2, 4, 5]
    assert (index[5:] == torch.arange(5)).all()


def test_self_is_excluded_by_its_number():
    x = torch.randn(60, 5, generator=rng(1)).repeat(2, 1)       # twins: the nearest need not be self
    index, similarity = graph.knn(x, 1)
    assert torch.equal(index[:, 0], (torch.arange(120) + 60) % 120)
    torch.testing.assert_close(similarity, torch.ones(120, 1))
    index, _ = graph.knn(x, 1, queries=x)
    assert torch.equal(index[:, 0], torch.arange(60).repeat(2))


def test_bfloat16_tiles_find_the_same_neighbours():
    """Alone they are right in a share of the rows, fewer if the rows share a direction; we are in all."""
    for offset, least, most in ((0, 0.8, 0.95), (4, 0.0, 0.1)):
        x = torch.randn(1500, 64, generator=rng(2)) + offset
        want, similarity = graph.knn(x, 10)
        unit = torch.nn.functional.normalize(x).bfloat16()
        alone = (unit @ unit.T).float().fill_diagonal_(-2).topk(10).indices
        assert least <= (alone.sort().values == want.sort().values).all(1).float().mean() <= most
        for tile in (torch.bfloat16, torch.float16):
            got = graph.knn(x, 10, tile=tile)
            assert torch.equal(got[0], want) and torch.equal(got[1], similarity)


def test_a_smaller_k_is_a_prefix():
    x = torch.randn(400, 7, generator=rng(4))
    index, similarity = graph.knn(x, 50)
    for k in (1, 10, 49):
        got = graph.knn(x, k)
        assert torch.equal(got[0], index[:, :k]) and torch.equal(got[1], similarity[:, :k])
        W, prefix = graph.affinity(*got), graph.affinity(index[:, :k], similarity[:, :k])
        assert torch.equal(W.to_dense(), prefix.to_dense())


def test_every_real_input_and_none_is_modified():
    whole = torch.randint(-40, 40, (90, 26), generator=rng(5))
    strided = whole[::2, 1::3].float()
    want = graph.knn(strided.clone(), 5)
    for x in (strided, whole[::2, 1::3], strided.half(), strided.double(), strided.T.contiguous().T,
              strided.numpy(), strided.clone().requires_grad_(), whole[::2, 1::3].to(torch.int8)):
        before = torch.as_tensor(x).detach().clone()
        index, similarity = graph.knn(x, 5)
        assert torch.equal(torch.as_tensor(x).detach(), before)
        check_neighbours(strided, 5, index, similarity.float())
        assert (similarity.dtype == torch.float64) == (torch.as_tensor(x).dtype == torch.float64)
        torch.testing.assert_close(similarity.float(), want[1])


def test_scale():
    """Squares that overflow or vanish."""
    x = torch.randn(80, 9, generator=rng(6), dtype=torch.float64)
    want = graph.knn(x, 6)[0]
    for y in (x * 1e300, x * 1e-300, (x * 2.0 ** 100).float(), (x * 2.0 ** -100).float()):
        assert (graph.knn(y, 6)[0] == want).float().mean() > 0.99


def test_one_row_and_one_column():
    index, similarity = graph.knn(torch.ones(1, 4), 3)
    assert index.shape == similarity.shape == (1, 0) and index.dtype == torch.int64
    index, similarity = graph.knn(torch.ones(1, 4), 3, queries=torch.ones(2, 4))
    assert index.tolist() == [[0], [0]] and similarity.tolist() == [[1], [1]]
    S, Y = graph.normalise(graph.affinity(*graph.knn(torch.ones(1, 4), 3))), torch.tensor([[0.25, 0.75]])
    assert graph.propagate(S, Y, 0.9).F.tolist() == Y.tolist()


@pytest.mark.parametrize("call, words", [
    (lambda x: graph.knn(x[:0], 3), "not empty"), (lambda x: graph.knn(x[:, :0], 3), "not empty"),
    (lambda x: graph.knn(x[0], 3), r"\(N, d\)"), (lambda x: graph.knn(x, 0), "k must be at least 1"),
    (lambda x: graph.knn(x * torch.nan, 3), "x holds NaN"), (lambda x: graph.knn(x / 0, 3), "x holds NaN"),
    (lambda x: graph.knn(x, 3, queries=x * torch.nan), "queries holds NaN"),
    (lambda x: graph.knn(x, 3, queries=x[:, :2]), "5 columns, queries 2"),
    (lambda x: graph.knn(x + 1j, 3), "complex"),
    (lambda x: graph.affinity(torch.tensor([[1]]), torch.ones(1, 1)), "index"),
    (lambda x: graph.affinity(torch.tensor([[1], [0]]), torch.ones(2, 2)), "shape|must be"),
    (lambda x: graph.affinity(torch.tensor([[1], [0]]), torch.tensor([[torch.nan], [1]])), "NaN")])
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(torch.randn(7, 5, generator=rng(7)))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tile", [torch.float32, torch.bfloat16])
def test_cuda_finds_the_same_neighbours(tile):
    x = torch.randn(5000, 96, generator=rng(8))
    want, got = graph.knn(x, 10), graph.knn(x.cuda(), 10, tile=tile)
    assert torch.equal(want[0], got[0].cpu())
    torch.testing.assert_close(want[1], got[1].cpu())


# ---------------------------------------------------------------------------------------- affinity, normalise

def dense_affinity(index, similarity, gamma):
    A = torch.zeros(len(index), len(index), dtype=torch.float64)
    A.scatter_(1, index, similarity.double().clamp(min=0) ** gamma)
    return A + A.T


@several
@given(features(), st.integers(1, 30), st.sampled_from([0.5, 1.0, 3.0]))
def test_affinity_and_normalise_are_their_formulas(x, k, gamma):
    index, similarity = graph.knn(x, k)
    W = graph.affinity(index, similarity, gamma=gamma)
    S = graph.normalise(W)
    assert W.layout == S.layout == torch.sparse_csr and W.dtype == S.dtype == torch.float64
    assert (W.values() > 0).all() and torch.equal(S.crow_indices(), W.crow_indices())
    W, S = W.to_dense(), S.to_dense()
    torch.testing.assert_close(W, dense_affinity(index, similarity, gamma), rtol=1e-12, atol=0)
    assert torch.equal(W, W.T) and torch.equal(S, S.T) and (W.diagonal() == 0).all()
    scale = torch.where(W.sum(1) > 0, W.sum(1), torch.inf).rsqrt()
    torch.testing.assert_close(S, scale[:, None] * W * scale, rtol=1e-12, atol=0)
    assert torch.linalg.eigvalsh(S).abs().max() <= 1 + 1e-12


def test_affinity_by_hand():
    """0-1 and 1-2 are mutual: twice; 0-2 is negative, 2-3 zero, 3-3 itself: nothing."""
    index = torch.tensor([[1, 2], [0, 2], [3, 1], [3, 0]])
    similarity = torch.tensor([[.5, -.5], [.5, .25], [0., .25], [1., .1]])
    W = graph.affinity(index, similarity, gamma=2).to_dense()
    want = torch.tensor([[0, .5, 0, .01], [.5, 0, .125, 0], [0, .125, 0, 0], [.01, 0, 0, 0]]).double()
    torch.testing.assert_close(W, want, rtol=1e-6, atol=0)
    count = graph.affinity(index, similarity, gamma=0).to_dense()
    assert count.tolist() == [[0, 2, 0, 1], [2, 0, 2, 0], [0, 2, 0, 0], [1, 0, 0, 0]]


def test_a_stored_zero_is_no_edge():
    ends = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    weight = torch.tensor([1., 1, 0, 0], dtype=torch.float64)
    S = graph.normalise(torch.sparse_coo_tensor(ends, weight, (3, 3), check_invariants=False).to_sparse_csr())
    assert S.to_dense().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    Y = torch.tensor([[1.], [0], [.5]])
    torch.testing.assert_close(graph.propagate(S, Y, 0.5).F, torch.tensor([[2 / 3], [1 / 3], [.5]]).double())


def test_weights_that_underflow_are_no_edge():
    """0-1 is a denormal number, whose scale would overflow; 2-3 is none."""
    index = torch.tensor([[1], [0], [3], [2]])
    W = graph.affinity(index, torch.tensor([[.49], [.49], [.9], [.9]], dtype=torch.float64), gamma=1000)
    assert 0 < W.to_dense()[0, 1] < torch.finfo(torch.float64).tiny
    S = graph.normalise(W)
    assert S.to_dense()[:2].count_nonzero() == 0 and S.to_dense()[2, 3].item() == pytest.approx(1)
    assert graph.propagate(S, torch.tensor([[.25], [.5], [1], [0]]), 0.5).F[:2].tolist() == [[.25], [.5]]
    gone = graph.affinity(index, torch.tensor([[.1], [.1], [.9], [.9]], dtype=torch.float64), gamma=1000)
    assert gone.crow_indices().tolist() == [0, 0, 0, 1, 2]      # .1 ** 1000 is zero: no entry


# ------------------------------------------------------------------------------------------------ propagation

def dense_solve(S, Y, alpha):
    """F = (1 - alpha)(I - alpha S)^-1 Y, dense; an isolated row keeps its Y."""
    S, F = S.to_dense(), Y.double().clone()
    u = S.any(1)
    A = torch.eye(int(u.sum()), dtype=torch.float64) - alpha * S[u][:, u]
    F[u] = torch.linalg.solve(A, (1 - alpha) * F[u])
    return F


@st.composite
def problems(draw):
    """(S, Y): one to three components, each a kNN graph, some rows cut off; a column may be constant."""
    parts, k = draw(st.integers(1, 3)), draw(st.integers(1, 11))
    blocks = [graph.affinity(*graph.knn(draw(features(2, 40)), k)).to_dense() for _ in range(parts)]
    g, W = rng(draw(st.integers(0, 2**31))), torch.block_diag(*blocks)
    alone = torch.randint(len(W), (draw(st.integers(0, 3)),), generator=g)
    W[alone], W[:, alone] = 0, 0
    Y = torch.rand(len(W), draw(st.sampled_from([1, 2, 3, 5])), generator=g)
    Y[:, 0] = draw(st.sampled_from([0.0, 1.0])) if draw(st.booleans()) else Y[:, 0]
    return graph.normalise(W.to_sparse_csr()), Y


alphas = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 0.999])


@several
@given(problems(), alphas)
def test_propagation_is_the_dense_solution(problem, alpha):
    S, Y = problem
    before = Y.clone()
    F, iterations, residual = graph.propagate(S, Y, alpha)
    want = dense_solve(S, Y, alpha)
    assert (F - want).abs().max() <= 1e-6 and residual <= 1e-6
    assert F.dtype == torch.float64 and torch.equal(Y, before)
    assert iterations <= len(Y) + 5
    isolated = ~S.to_dense().any(1)
    assert torch.equal(F[isolated], Y[isolated].double())
    gap = ((1 - alpha) * Y.double() + alpha * (S @ F) - F)[~isolated]
    assert gap.numel() == 0 or gap.norm(dim=0).max() <= 1e-6
    if alpha == 0:
        assert torch.equal(F, Y.double()) and iterations == 0
    tight = graph.propagate(S, Y, alpha, tol=1e-11)
    assert (tight.F - want).abs().max() <= 1e-11 and tight.residual <= 1e-11


@several
@given(problems(), alphas)
def test_symmetries(problem, alpha):
    """Swap the classes or renumber the nodes, and F follows; no column sees another; F is linear."""
    S, Y = problem
    F = graph.propagate(S, Y, alpha, tol=1e-10).F
    exact, close = dict(rtol=0, atol=1e-12), dict(rtol=0, atol=1e-9)  # alpha 0.99: 200 times float64's eps
    torch.testing.assert_close(graph.propagate(S, Y.flip(1), alpha, tol=1e-10).F, F.flip(1), **exact)
    torch.testing.assert_close(graph.propagate(S, Y[:, :1], alpha, tol=1e-10).F, F[:, :1], **exact)
    order = torch.randperm(len(Y), generator=rng(len(Y)))
    moved = S.to_dense()[order][:, order].to_sparse_csr()
    torch.testing.assert_close(graph.propagate(moved, Y[order], alpha, tol=1e-10).F, F[order], **close)
    torch.testing.assert_close(graph.propagate(S, 3 * Y.double(), alpha, tol=1e-10).F, 3 * F, **close)
    assert F.min() >= -1e-9                     # a sum of non-negative terms


def test_components_never_mix():
    left, right = torch.randn(41, 3, generator=rng(9)), torch.randn(53, 3, generator=rng(10))
    W = torch.block_diag(*(graph.affinity(*graph.knn(x, 5)).to_dense() for x in (left, right)))
    S, Y = graph.normalise(W.to_sparse_csr()), torch.zeros(94, 2)
    Y[:41] = torch.rand(41, 2, generator=rng(11))
    F = graph.propagate(S, Y, 0.99).F
    assert (F[41:] == 0).all() and (F[:41] > 0).all()


def test_limit_of_alpha():
    """For alpha -> 1, F is Y's projection on the eigenvector of S at 1: sqrt(degree), of each component."""
    W = torch.diag(torch.tensor([1., 2, 3, 0, 1, 2]), 1).double()       # two paths, 0 ... 3 and 4 ... 6
    W = W + W.T
    v = W.sum(1).sqrt()[:, None] * torch.tensor([[1., 0]] * 4 + [[0, 1]] * 3)           # (7, 2)
    Y, v = torch.rand(7, 3, generator=rng(17)).double(), v / v.norm(dim=0)
    F = graph.propagate(graph.normalise(W.to_sparse_csr()), Y, 1 - 1e-6).F
    torch.testing.assert_close(F, v @ (v.T @ Y), rtol=0, atol=1e-4)


def test_not_converged_is_said():
    S = graph.normalise(graph.affinity(*graph.knn(torch.randn(300, 3, generator=rng(12)), 4)))
    Y = torch.rand(300, 2, generator=rng(13))
    with pytest.warns(UserWarning, match="> tol 1e-06 at step 3/3"):
        result = graph.propagate(S, Y, 0.99, max_iter=3)
    assert result.iterations == 3 and result.residual > 1e-3
    gap = (0.01 * Y.double() + 0.99 * (S @ result.F) - result.F).norm(dim=0) / (0.01 * Y.double().amax(0))
    assert result.residual == pytest.approx(gap.max().item(), rel=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graph.propagate(S, Y, 0.99).iterations > 3


def test_a_residual_that_is_no_number_is_said():
    S = torch.tensor([[0., torch.inf], [torch.inf, 0.]], dtype=torch.float64).to_sparse_csr()
    with pytest.warns(UserWarning, match="residual nan > tol"):
        graph.propagate(S, torch.rand(2, 1), 0.5)


def test_a_converged_column_stands_still():
    """The first column is its own fixed point, the second needs steps, the third is zero."""
    S = graph.normalise(graph.affinity(*graph.knn(torch.randn(200, 3, generator=rng(14)), 6)))
    top = torch.linalg.eigh(S.to_dense()).eigenvectors[:, -1]       # S v = v, so F = Y = v
    Y = torch.stack((top, torch.rand(200, generator=rng(15)).double(), torch.zeros(200)), 1)
    F = graph.propagate(S, Y, 0.99).F
    torch.testing.assert_close(F, dense_solve(S, Y, 0.99), rtol=0, atol=1e-6)
    assert (F[:, 2] == 0).all()


@pytest.mark.parametrize("Y, alpha, words", [
    (torch.ones(9, 2), 1.0, "alpha"), (torch.ones(9, 2), -0.1, "alpha"), (torch.ones(9, 2), torch.nan, "al"),
    (torch.ones(8, 2), 0.5, "Y must"), (torch.ones(9), 0.5, "Y must"), (torch.ones(9, 0), 0.5, "Y must"),
    (torch.full((9, 2), torch.nan), 0.5, "Y must be"), (torch.full((9, 2), torch.inf), 0.5, "Y must be")])
def test_what_propagate_refuses(Y, alpha, words):
    S = graph.normalise(graph.affinity(*graph.knn(torch.randn(9, 3, generator=rng(16)), 2)))
    with pytest.raises(ValueError, match=words):
        graph.propagate(S, Y, alpha)


def test_golden():
    """The file a porter passes without torch (see make_golden.py) is what this code gives."""
    g = load_file(GOLDEN)
    index, similarity = graph.knn(g["x"], g["cosine.index"].shape[1])
    assert torch.equal(index, g["cosine.index"].long())
    torch.testing.assert_close(similarity, g["cosine.similarity"], rtol=0, atol=1e-6)
    W = graph.affinity(g["cosine.index"].long(), g["cosine.similarity"])
    S = graph.normalise(W)
    assert torch.equal(S.crow_indices(), g["S.crow"].long())
    assert torch.equal(S.col_indices(), g["S.col"].long())
    torch.testing.assert_close(W.values(), g["W.value"], rtol=1e-12, atol=0)
    torch.testing.assert_close(S.values(), g["S.value"], rtol=1e-12, atol=0)
    for name, alpha in (("half", 0.5), ("most", 0.99)):
        F = graph.propagate(S, g["Y"], alpha).F
        torch.testing.assert_close(F, g[f"F.{name}"], rtol=0, atol=1e-6)
