"""Exact nearest neighbours and label propagation: the graph smoothing of weak labels (step 6 of the method).

Selective weak-to-strong generalization (Lang et al. 2026, arXiv 2511.14166) refines the weak labels it keeps by graph smoothing and
leaves the graph open to us; ours is the kNN graph of Iscen et al. 2019 (arXiv 1904.04717) with the propagation of Zhou et al. 2004:

    index, similarity = knn(x, k)               NN_k(i) and s_ij, exact
    W = affinity(index, similarity)             A_ij = max(0, s_ij)^gamma for j in NN_k(i);  W = A + A^T
    S = normalise(W)                            S = D^-1/2 W D^-1/2,  D = diag(W 1)
    F = propagate(S, Y, alpha).F                F = (1 - alpha)(I - alpha S)^-1 Y

    symbol   code         shape      what
    x_i      x            (N, d)     features of node i
    NN_k     index        (N, k)     the k nearest other nodes, nearest first: the first columns are those of a smaller k
    s_ij     similarity   (N, k)     cosine, or 1 / (1 + distance)
    W, S     W, S         (N, N)     affinity and its symmetric normalisation: sparse CSR, float64
    Y, F     Y, F         (N, M)     labels before and after, a column per class
    alpha    alpha        in [0, 1)  weight of the neighbours; 0 returns Y bit for bit
"""
import warnings
from typing import NamedTuple

import torch

GROUP = 16            # columns per group: the k largest entries of a row lie in the k groups with the largest maxima
TINY = 2.0 ** -1000   # under every length that matters; keeps 0 / 0 away


class _Points(NamedTuple):
    """Rows scaled so that s(a, b) = a.b - half_a - half_b is the cosine (half 0) or -|a - b|^2 / 2 (half |a|^2 / 2)."""
    x: torch.Tensor      # (N, d) float64, no row longer than 1
    half: torch.Tensor   # (N,)


def _checked(x, name):
    x = torch.as_tensor(x).detach()
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"knn: {name} must be (N, d) and not empty, got shape {tuple(x.shape)}")
    if x.is_complex() or not all(end.isfinite() for end in x.aminmax()):
        raise ValueError(f"knn: {name} holds NaN, infinite or complex values")
    return x


def _prepare(tables, metric):
    """float64 copies of the tables as _Points, and the length that became 1. Divided by the largest entry first: no square overflows."""
    tables = [x.to(torch.float64, copy=True) for x in tables]
    if metric == "cosine":
        for x in tables:
            x.div_(x.abs().amax(1, keepdim=True).clamp(min=TINY))
            x.div_(x.norm(dim=1, keepdim=True).clamp(min=TINY))
        return [_Points(x, x.new_zeros(len(x))) for x in tables], 1.0
    peak = max(x.abs().max().item() for x in tables) or 1.0
    centre = (tables[0] / peak).mean(0)     # moving the origin changes no distance, but keeps a.b - half_a - half_b from cancelling
    radius = max(x.div_(peak).sub_(centre).norm(dim=1).max().item() for x in tables) or 1.0
    each = [torch.arange(len(x), device=x.device) for x in tables]
    return [_Points(x.div_(radius), _dots(x, x, i, i) / 2) for x, i in zip(tables, each)], peak * radius    # s(a, a) = 0 exactly


def _csr(row, col, value, shape):
    """Sparse CSR matrix of entries sorted by row."""
    crow = torch.nn.functional.pad(row.bincount(minlength=shape[0]).cumsum(0), (1, 0))
    with warnings.catch_warnings():     # PyTorch says once per process that CSR is in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(crow, col, value, shape, check_invariants=False)


def _dots(a, b, row, col):
    """The entries (row, col) of a b^T, each by one fixed order of additions: no block or neighbour changes its bits."""
    pattern = _csr(row, col, a.new_zeros(len(col)), (len(a), len(b)))
    return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0).values()


def _score(a, b, row, col):
    return _dots(a.x, b.x, row, col) - a.half[row] - b.half[col]


class _Shortlist:
    """Each row's `keep` best columns so far by tile similarity; no column left out lies above the row's `bound`."""

    def __init__(self, rows, keep, device):
        self.keep, self.width = keep, 2 * keep      # the second half collects columns until the row is sorted out again
        self.similarity = torch.full((rows, self.width), -torch.inf, device=device)
        self.index = torch.zeros((rows, self.width), dtype=torch.int64, device=device)
        self.filled = torch.zeros(rows, dtype=torch.int64, device=device)
        self.bound = torch.full((rows,), -torch.inf, device=device)

    def offer(self, rows, first, tile, top):
        """Show the rows (a slice) a tile (R, G, GROUP) and its group maxima top (R, G); its columns are first + g + G * lane."""
        bound, groups = self.bound[rows], top.shape[1]
        row, group = (top > bound[:, None]).nonzero(as_tuple=True)
        if len(row) > 2 * self.keep * len(top) and groups > self.keep:      # the first tiles: their maxima are a bound
            bound = self.bound[rows] = torch.maximum(bound, top.topk(self.keep + 1).values[:, -1])
            row, group = (top > bound[:, None]).nonzero(as_tuple=True)
        value = tile[row, group]                                            # (H, GROUP)
        hit, lane = (value > bound[row, None]).nonzero(as_tuple=True)
        row, col, value = row[hit], first + group[hit] + groups * lane, value[hit, lane]
        while len(row):
            count, filled = row.bincount(minlength=len(top)), self.filled[rows]
            rank = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
            slot = filled[row] + rank
            fits = slot < self.width
            place = (row + rows.start)[fits], slot[fits]
            self.similarity[place], self.index[place] = value[fits], col[fits]
            self.filled[rows] = (filled + count).clamp(max=self.width)
            if fits.all():
                break
            self.shrink(rows)
            rest = ~fits & (value > self.bound[rows][row])
            row, col, value = row[rest], col[rest], value[rest]

    def shrink(self, rows):
        best, slot = self.similarity[rows].topk(self.keep, sorted=False)    # (R, keep)
        self.index[rows, :self.keep] = self.index[rows].gather(1, slot)
        self.similarity[rows, :self.keep], self.similarity[rows, self.keep:] = best, -torch.inf
        self.filled[rows] = self.filled[rows].clamp(max=self.keep)
        self.bound[rows] = torch.maximum(self.bound[rows], best.amin(1))


def _nominate(a, b, own, k, block, dtype):
    """A shortlist of k and a few columns per row from tiles in dtype. With own (a is b) a tile serves its rows and its columns."""
    def padded(points):     # whole groups
        x = points.x.new_zeros(-(-len(points.x) // GROUP) * GROUP, points.x.shape[1], dtype=dtype)
        x[:len(points.x)] = points.x
        return x, torch.nn.functional.pad(points.half.float(), (0, len(x) - len(points.x)))
    (u, hu), (v, hv) = (padded(a), padded(b)) if not own else (padded(a),) * 2
    N, flat = len(b.x), not b.half.any()
    p, q = a.x[:256], b.x[:256]
    rough = ((p.to(dtype) @ q.to(dtype).T).double() - p @ q.T).abs().max() > 1e-5
    found = _Shortlist(len(u), k + (16 + k // 2 if rough else 4), u.device)
    buffer = u.new_empty(min(block, len(u)) * min(block, len(v)))
    for i in range(0, len(u), block):
        for j in range(i if own else 0, len(v), block):
            I, J = slice(i, min(i + block, len(u))), slice(j, min(j + block, len(v)))
            shape = R, C = I.stop - i, J.stop - j
            T = torch.mm(u[I], v[J].T, out=buffer[:R * C].view(shape)).float()                  # (R, C)
            if not flat:
                T.sub_(hu[I, None]).sub_(hv[J])
            T[:, N - j:] = -torch.inf
            if own:
                T[N - i:] = -torch.inf
                if i == j:
                    T.fill_diagonal_(-torch.inf)
                else:
                    V = T.view(GROUP, R // GROUP, C)
                    found.offer(J, i, V.permute(2, 1, 0), V.amax(0).T)
            V = T.view(R, GROUP, C // GROUP)
            found.offer(I, j, V.transpose(1, 2), V.amax(1))
    for i in range(0, len(u), block):
        found.shrink(slice(i, min(i + block, len(u))))
    return found


def _settle(a, b, own, k, found, dtype, chunk):
    """(index, s) of the k best of every row, from its shortlist where that can be proved complete, else from all columns."""
    index, order = found.index[:len(a.x), :found.keep].sort(dim=1)          # (N, keep), so that ties go to the lower index
    rough = found.similarity[:len(a.x)].gather(1, order)
    s, (row, slot) = rough.double(), (rough > -torch.inf).nonzero(as_tuple=True)
    s[row, slot] = _score(a, b, row, index[row, slot])
    error = 3 * (s - rough).nan_to_num(0).abs().max()                       # of the tiles, measured on the candidates
    slack = 4 * max(torch.finfo(dtype).eps, a.x.shape[1] * torch.finfo(torch.float64).eps)
    s, order = s.to(dtype).sort(dim=1, descending=True, stable=True)
    s, index, kth = s[:, :k].contiguous(), index.gather(1, order[:, :k]), s[:, k - 1].double()
    bound = found.bound[:len(a.x)].double()
    for rows in (kth <= bound + error + slack).nonzero()[:, 0].split(max(1, chunk // len(b.x))):
        every = a.x[rows] @ b.x.T - a.half[rows, None] - b.half             # (R, N)
        if own:
            every.scatter_(1, rows[:, None], -torch.inf)
        floor = torch.maximum(kth, bound - error)[rows, None] - slack       # at least k columns lie above
        row, col = (every >= floor).nonzero(as_tuple=True)
        again = _score(_Points(a.x[rows], a.half[rows]), b, row, col).to(dtype)
        order = again.sort(descending=True, stable=True).indices
        order = order[row[order].sort(stable=True).indices]                 # by row, then s, then index
        count = row.bincount(minlength=len(rows))
        best = order[(count.cumsum(0) - count)[:, None] + torch.arange(k, device=row.device)]      # (R, k)
        index[rows], s[rows] = col[best], again[best]
    return index, s


@torch.no_grad()
def knn(x, k, *, queries=None, metric="cosine", block=None, tile=torch.float32):
    """The k nearest rows of x (N, d), exact: index (N, k) int64 and similarity (N, k), nearest first, ties to the lower index.

    Self-join: neighbours of x's own rows, row i never its own neighbour. With queries (Q, d): their neighbours in x, none excluded.
    metric "cosine" (a zero row is at 0 from all) or "euclidean", whose similarity is 1 / (1 + distance): affinity then weighs by
    inverse distance. k beyond the rows there are is cut. Any real dtype; the similarity is float32 (float64 for float64 features).
    ValueError: x not (N, d), empty, NaN or infinite; k < 1; unknown metric.

    Tiles of block x block similarities only nominate a few more than k candidates: memory O(N k + block^2). Candidates are scored
    again in float64 pair by pair, so no block and no tile dtype changes a result. tile=torch.bfloat16, or float32 under PyTorch's
    TF32 switch, is faster on hardware that has it: the tiles' error is measured on the candidates, and rows whose k-th neighbour does
    not clear it are done again in float64. block None: 2048 on a CPU, 16384 elsewhere.
    """
    x = _checked(x, "x")
    tables = [x] if queries is None else [x, _checked(queries, "queries")]
    if tables[-1].shape[1] != x.shape[1]:
        raise ValueError(f"knn: x has {x.shape[1]} columns, queries {tables[-1].shape[1]}")
    if k < 1 or metric not in ("cosine", "euclidean"):
        raise ValueError(f"knn: k must be at least 1 and metric cosine or euclidean, got {k} and {metric!r}")
    own, dtype = queries is None, torch.promote_types(x.dtype, torch.float32)
    points, unit = _prepare(tables, metric)
    a, b, k = points[-1], points[0], min(k, len(x) - own)
    if k == 0:
        return torch.zeros((len(a.x), 0), dtype=torch.int64, device=x.device), a.x.new_zeros((len(a.x), 0), dtype=dtype)
    block = block or (2048 if x.device.type == "cpu" else 16384)
    found = _nominate(a, b, own, k, -(-block // GROUP) * GROUP, tile)
    index, s = _settle(a, b, own, k, found, dtype, block * block // 2)
    return index, s if metric == "cosine" else 1 / (1 + unit * (-2 * s).clamp(min=0).sqrt())


def affinity(index, similarity, *, gamma=3.0):
    """W = A + A^T with A_ij = max(0, similarity_ij)^gamma for j = index_i1 ... index_ik (N, k); zero diagonal, no stored zeros.

    Sparse CSR (N, N) float64. A pair that is mutual counts from both sides [Iscen et al. 2019]. ValueError: shapes differ, an index
    outside 0 ... N - 1 (neighbours of separate queries are no graph), NaN.
    """
    N = len(index)
    if index.ndim != 2 or index.shape != similarity.shape or N == 0:
        raise ValueError(f"affinity: index and similarity must be (N, k), got {tuple(index.shape)}, {tuple(similarity.shape)}")
    if similarity.isnan().any() or (index < 0).any() or (index >= N).any():
        raise ValueError(f"affinity: similarity holds NaN or index leaves 0 ... {N - 1}")
    row = torch.arange(N, device=index.device)[:, None].expand_as(index)
    edge = (similarity > 0) & (index != row)
    row, col, weight = row[edge], index[edge], similarity[edge].double() ** gamma       # (E,)
    ends = torch.stack((torch.cat((row, col)), torch.cat((col, row))))                  # (2, 2 E)
    W = torch.sparse_coo_tensor(ends, weight.repeat(2), (N, N), check_invariants=False).coalesce()
    return _csr(*W.indices(), W.values(), W.shape)


def normalise(W):
    """S = D^-1/2 W D^-1/2 with D = diag(W 1), W sparse CSR (N, N): eigenvalues in [-1, 1]; an isolated row stays zero."""
    row = torch.arange(len(W), device=W.device).repeat_interleave(W.crow_indices().diff())
    degree = W.values().new_zeros(len(W)).index_add(0, row, W.values())                 # (N,)
    scale = torch.where(degree > 0, degree.rsqrt(), 0)
    return _csr(row, W.col_indices(), W.values() * (scale[row] * scale[W.col_indices()]), W.shape)


class Propagation(NamedTuple):
    F: torch.Tensor      # (N, M) float64
    iterations: int      # of the column that took most
    residual: float      # max over columns of |(1-alpha) Y + alpha S F - F|_2 / ((1-alpha) max|Y|): bounds max|F - exact| / max|Y|


@torch.no_grad()
def propagate(S, Y, alpha, *, clamp=None, tol=1e-6, max_iter=1000):
    """F = (1 - alpha)(I - alpha S)^-1 Y [Zhou et al. 2004]: the fixed point F = alpha S F + (1 - alpha) Y, not T steps towards it.

    S: symmetric sparse CSR (N, N) as normalise returns it; Y (N, M) finite. All columns are solved at once by conjugate gradients in
    float64 until each has residual <= tol: no entry of F is then further than tol max|Y| from the exact one (S has no eigenvalue
    above 1). A residual above tol is returned and warned of.
    A free row has neighbours and is not clamped. An isolated row (its row of S is zero) is exactly its prior: F_i = Y_i.
    clamp (N,) bool holds rows c at their labels (anchors); the free rows u then solve
        F_c = Y_c,  F_u = (I - alpha S_uu)^-1 ((1 - alpha) Y_u + alpha S_uc Y_c),
    for alpha -> 1 the harmonic function of the normalised graph Laplacian. ValueError: alpha outside [0, 1), Y not (N, M) or not finite.
    """
    Y = torch.as_tensor(Y).to(S.device, torch.float64)
    if not 0 <= alpha < 1:
        raise ValueError(f"propagate: alpha must lie in [0, 1), got {alpha}")
    if Y.ndim != 2 or len(Y) != len(S) or 0 in Y.shape or not Y.isfinite().all():
        raise ValueError(f"propagate: Y must be ({len(S)}, M), not empty and finite, got shape {tuple(Y.shape)}")
    free = S.crow_indices().diff() > 0                                                  # (N,)
    if clamp is not None:
        free = free & ~clamp
    free = free.double()[:, None]
    F, S, scale = Y.clone(), S.double(), (1 - alpha) * Y.abs().amax(0)                   # (N, M), (N, N), (M,)
    R = free * alpha * (S @ Y - Y)          # the residual at F = Y, which is zero for alpha = 0
    P, rr, goal, iterations = R.clone(), (R * R).sum(0), (tol * scale) ** 2, 0
    while (rr > goal).any() and iterations < max_iter:
        Q = P - free * alpha * (S @ P)      # (I - alpha S_uu) P
        step = torch.where(rr > goal, rr / (P * Q).sum(0), 0)       # a column that has converged stands still
        F += step * P
        R -= step * Q
        rr, last = (R * R).sum(0), rr
        P = R + torch.where(rr > goal, rr / last, 0) * P
        iterations += 1
    R = free * ((1 - alpha) * Y + alpha * (S @ F) - F)
    residual = torch.where(scale > 0, R.norm(dim=0) / scale, 0).max().item()
    if residual > tol:
        warnings.warn(f"propagate: residual {residual:.1e} > tol {tol:.1e} after {iterations} steps; raise max_iter", stacklevel=2)
    return Propagation(F, iterations, residual)
