"""Exact nearest neighbours and label propagation: the graph smoothing of weak labels, step 6 of the method.

Selective weak-to-strong generalization (Lang et al. 2026, arXiv 2511.14166) refines the weak labels it keeps
by graph smoothing and leaves the graph open. Ours is the kNN graph of Iscen et al. 2019 (arXiv 1904.04717)
with the propagation of Zhou et al. 2004, "Learning with local and global consistency".

    index, similarity = knn(x, k)         NN_k(i) and s_ij, exact
    W = affinity(index, similarity)       A_ij = max(0, s_ij)^gamma for j in NN_k(i);  W = A + A^T
    S = normalise(W)                      S = D^-1/2 W D^-1/2,  D = diag(W 1)
    F = propagate(S, Y, alpha).F          F = (1 - alpha)(I - alpha S)^-1 Y

    symbol   code         shape       what
    x_i      x            (N, d)      features of node i
    NN_k     index        (N, k)      the k nearest other nodes, nearest first: a smaller k is a prefix
    s_ij     similarity   (N, k)      cosine, or 1 / (1 + distance)
    W, S     W, S         (N, N)      affinity and its symmetric normalisation, sparse CSR, float64
    Y, F     Y, F         (N, M)      labels before and after, a column per class
    alpha    alpha        in [0, 1)   weight of the neighbours; 0 returns Y bit for bit

Shape letters besides these: Q queries, R x C one tile, G groups of a tile, H and E entries found.
"""
import warnings
from typing import NamedTuple

import torch

GROUP = 16              # entries per group: a row's k largest lie in the k groups with the largest maxima
TINY = 2.0 ** -1000     # shorter than any row but zero; keeps 0 / 0 away


class _Points(NamedTuple):
    """Rows for which s(a, b) = a.b - half_a - half_b is the cosine, or -|a - b|^2 / 2 with half |.|^2 / 2."""
    x: torch.Tensor         # (N, d) float64, no row longer than 1
    half: torch.Tensor      # (N,)


def _checked(x, name):
    x = torch.as_tensor(x).detach()
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"knn: {name} must be (N, d) and not empty, got shape {tuple(x.shape)}")
    if x.is_complex() or not all(end.isfinite() for end in x.aminmax()):
        raise ValueError(f"knn: {name} holds NaN, infinite or complex values")
    return x


def _csr(row, col, value, shape):
    """Sparse CSR matrix of entries sorted by row."""
    crow = torch.nn.functional.pad(row.bincount(minlength=shape[0]).cumsum(0), (1, 0))
    with warnings.catch_warnings():     # PyTorch says once per process that CSR is in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(crow, col, value, shape, check_invariants=False)


def _score(a, b, row, col):
    """s(a_row, b_col) (E,), sorted by row: a pair is summed by itself, in one order, to the same bits."""
    pattern = _csr(row, col, a.x.new_zeros(len(col)), (len(a.x), len(b.x)))
    return torch.sparse.sampled_addmm(pattern, a.x, b.x.T, beta=0).values() - a.half[row] - b.half[col]


def _prepare(tables, metric):
    """The tables as _Points, and the length that became 1. The largest entry first: no square overflows."""
    tables = [x.to(torch.float64, copy=True) for x in tables]
    points = [_Points(x, x.new_zeros(len(x))) for x in tables]
    if metric == "cosine":
        for x in tables:
            x.div_(x.abs().amax(1, keepdim=True).clamp(min=TINY))
            x.div_(x.norm(dim=1, keepdim=True).clamp(min=TINY))
        return points, 1.0
    peak = max(x.abs().max().item() for x in tables) or 1.0
    centre = (tables[0] / peak).mean(0)     # moves no distance; far from 0, s would be a small difference
    radius = max(x.div_(peak).sub_(centre).norm(dim=1).max().item() for x in tables) or 1.0
    for x in tables:
        x.div_(radius)
    each = [torch.arange(len(x), device=x.device) for x in tables]
    halves = [_score(p, p, i, i) / 2 for p, i in zip(points, each)]     # by _score: s(a, a) is 0 exactly
    return [_Points(x, half) for x, half in zip(tables, halves)], peak * radius


class _Shortlist:
    """The `keep` best columns of each row in the tiles seen; no other column lies above the row's `bound`."""

    def __init__(self, rows, keep, device):
        self.keep, self.width = keep, 2 * keep      # the second half collects until shrink sorts it out
        self.similarity = torch.full((rows, self.width), -torch.inf, device=device)
        self.index = torch.zeros((rows, self.width), dtype=torch.int64, device=device)
        self.filled = torch.zeros(rows, dtype=torch.int64, device=device)
        self.bound = torch.full((rows,), -torch.inf, device=device)

    def offer(self, rows, first, tile, top):
        """Show rows (a slice) a tile (R, G, GROUP), columns first + g + G * lane; top (R, G) its maxima."""
        bound, groups = self.bound[rows], top.shape[1]
        row, group = (top > bound[:, None]).nonzero(as_tuple=True)
        if len(row) > 2 * self.keep * len(top) and groups > self.keep:      # early: the maxima make a bound
            bound = self.bound[rows] = torch.maximum(bound, top.topk(self.keep + 1).values[:, -1])
            row, group = (top > bound[:, None]).nonzero(as_tuple=True)
        value = tile[row, group]                                            # (H, GROUP)
        hit, lane = (value > bound[row, None]).nonzero(as_tuple=True)
        row, col, value = row[hit], first + group[hit] + groups * lane, value[hit, lane]    # (E,), by row
        while len(row):
            count, filled = row.bincount(minlength=len(top)), self.filled[rows]
            rank = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
            slot = filled[row] + rank
            fits = slot < self.width
            place = row[fits] + rows.start, slot[fits]
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
    """A shortlist of more than k columns for each row, from tiles of s in dtype. own: a is b, and no self."""
    def whole(points):      # whole groups, the last one filled up with zero rows
        fill = -len(points.x) % GROUP
        x = points.x.new_zeros(len(points.x) + fill, points.x.shape[1], dtype=dtype)
        x[:len(points.x)] = points.x
        return x, torch.nn.functional.pad(points.half.float(), (0, fill))
    u, half_u = whole(a)
    v, half_v = (u, half_u) if own else whole(b)
    p, q = a.x[:256], b.x[:256]
    rough = ((p.to(dtype) @ q.to(dtype).T).double() - p @ q.T).abs().max() > 1e-5
    found = _Shortlist(len(u), k + (16 + k // 2 if rough else 4), u.device)
    buffer = u.new_empty(min(block, len(u)) * min(block, len(v)))
    flat = not (a.half.any() or b.half.any())
    for i in range(0, len(u), block):
        for j in range(i if own else 0, len(v), block):     # own: the tile (i, j) holds the tile (j, i)
            I, J = slice(i, min(i + block, len(u))), slice(j, min(j + block, len(v)))
            R, C = I.stop - i, J.stop - j
            T = torch.mm(u[I], v[J].T, out=buffer[:R * C].view(R, C)).float()               # (R, C)
            if not flat:
                T.sub_(half_u[I, None]).sub_(half_v[J])
            T[:, len(b.x) - j:] = -torch.inf
            if own and i == j:
                T.fill_diagonal_(-torch.inf)
            V = T.view(R, GROUP, C // GROUP)        # group g: every G-th column, which is fast to reduce
            found.offer(I, j, V.transpose(1, 2), V.amax(1))
            if own and i != j:
                V = T.view(GROUP, R // GROUP, C)
                found.offer(J, i, V.permute(2, 1, 0), V.amax(0).T)
    for i in range(0, len(u), block):
        found.shrink(slice(i, min(i + block, len(u))))
    return found


def _settle(a, b, own, k, found, dtype, chunk):
    """index, s (N, k): from the shortlist where it is surely complete, else from all columns in float64."""
    index, order = found.index[:len(a.x), :found.keep].sort(dim=1)      # (N, keep): ties to the lower index
    rough, bound = found.similarity[:len(a.x)].gather(1, order), found.bound[:len(a.x)].double()
    s, (row, slot) = rough.double(), (rough > -torch.inf).nonzero(as_tuple=True)
    s[row, slot] = _score(a, b, row, index[row, slot])
    error = 3 * (s - rough).nan_to_num(0).abs().max()                   # of the tiles, seen on the candidates
    slack = 4 * max(torch.finfo(dtype).eps, a.x.shape[1] * torch.finfo(torch.float64).eps)      # of s itself
    s, order = s.to(dtype).sort(dim=1, descending=True, stable=True)
    s, index, kth = s[:, :k].contiguous(), index.gather(1, order[:, :k]), s[:, k - 1].double()
    for rows in (kth <= bound + error).nonzero()[:, 0].split(max(1, chunk // len(b.x))):
        every = a.x[rows] @ b.x.T - a.half[rows, None] - b.half         # (R, N)
        if own:
            every.scatter_(1, rows[:, None], -torch.inf)
        floor = torch.maximum(kth, bound - error)[rows, None] - slack   # at least k columns lie above
        row, col = (every >= floor).nonzero(as_tuple=True)
        again = _score(_Points(a.x[rows], a.half[rows]), b, row, col).to(dtype)
        order = again.sort(descending=True, stable=True).indices
        order = order[row[order].sort(stable=True).indices]             # by row, then s, then index
        count = row.bincount(minlength=len(rows))
        best = order[(count.cumsum(0) - count)[:, None] + torch.arange(k, device=row.device)]   # (R, k)
        index[rows], s[rows] = col[best], again[best]
    return index, s


@torch.no_grad()
def knn(x, k, *, queries=None, metric="cosine", block=None, tile=torch.float32):
    """The k nearest rows of x (N, d), exact: index (N, k) int64 and similarity (N, k), nearest first.

    Ties, of s rounded to the output's dtype (s: the cosine, or -distance^2 / 2), go to the lower index.
    Without queries: neighbours of x's own rows, no row its own. With queries
    (Q, d): of these among the rows of x, none excluded. k is cut to the rows there are. metric "cosine" (of a
    zero row: 0) or "euclidean", whose similarity is 1 / (1 + distance): affinity weighs by inverse distance.
    Any real dtype; similarity float32, or float64 for float64 features. ValueError: not (N, d), empty, NaN,
    infinite, k < 1.

    Tiles of block x block similarities only nominate a few more than k candidates, which are scored again in
    float64 pair by pair: memory O(N (d + k) + block^2), and neither block nor tile changes a result. With
    tile=torch.bfloat16, or float32 under PyTorch's TF32 switch, it is faster where the hardware is. The error
    of the tiles is taken as three times the largest seen on a candidate; rows whose k-th neighbour does not
    clear it are done again in float64. block None: 2048 on a CPU, 16384 elsewhere.
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
        return x.new_zeros((len(a.x), 0), dtype=torch.int64), x.new_zeros((len(a.x), 0), dtype=dtype)
    block = block or (2048 if x.device.type == "cpu" else 16384)
    found = _nominate(a, b, own, k, -(-block // GROUP) * GROUP, tile)
    index, s = _settle(a, b, own, k, found, dtype, block * block // 2)
    return index, s if metric == "cosine" else 1 / (1 + unit * (-2 * s).clamp(min=0).sqrt())


def affinity(index, similarity, *, gamma=3.0):
    """W = A + A^T, A_ij = max(0, similarity_ij)^gamma for j among index_i; zero diagonal, no zero stored.

    index, similarity (N, k) as knn returns them; W sparse CSR (N, N) float64. A mutual pair counts from both
    sides [Iscen et al. 2019]. ValueError: shapes differ, NaN, an index beyond N - 1 (as of separate queries).
    """
    N = len(index)
    if index.ndim != 2 or index.shape != similarity.shape or N == 0:
        shapes = tuple(index.shape), tuple(similarity.shape)
        raise ValueError(f"affinity: index and similarity must both be (N, k), got shapes {shapes}")
    if similarity.isnan().any() or (index < 0).any() or (index >= N).any():
        raise ValueError(f"affinity: similarity holds NaN, or index leaves 0 ... {N - 1}")
    row = torch.arange(N, device=index.device)[:, None].expand_as(index)
    edge = (similarity > 0) & (index != row)
    row, col, weight = row[edge], index[edge], similarity[edge].double() ** gamma       # (E,)
    ends = torch.stack((torch.cat((row, col)), torch.cat((col, row))))                  # (2, 2 E)
    W = torch.sparse_coo_tensor(ends, weight.repeat(2), (N, N), check_invariants=False).coalesce()
    return _csr(*W.indices(), W.values(), W.shape)


def normalise(W):
    """S = D^-1/2 W D^-1/2, D = diag(W 1), sparse CSR: eigenvalues in [-1, 1]; an isolated row stays zero."""
    row = torch.arange(len(W), device=W.device).repeat_interleave(W.crow_indices().diff())
    col, value = W.col_indices(), W.values()                                            # (E,)
    degree = (W @ value.new_ones(len(W), 1))[:, 0]                                      # (N,)
    scale = torch.where(degree > 0, degree.rsqrt(), 0)
    return _csr(row, col, value * (scale[row] * scale[col]), W.shape)                   # symmetric to the bit


class Propagation(NamedTuple):
    F: torch.Tensor         # (N, M) float64
    iterations: int         # of the column that took most
    residual: float         # of the worst column: |(1 - alpha) Y + alpha S F - F| / ((1 - alpha) max|Y|)


@torch.no_grad()
def propagate(S, Y, alpha, *, clamp=None, tol=1e-6, max_iter=1000):
    """F = (1 - alpha)(I - alpha S)^-1 Y, the fixed point of F = alpha S F + (1 - alpha) Y [Zhou et al. 2004].

    S symmetric sparse CSR (N, N) from normalise, Y (N, M). Conjugate gradients in float64 on all columns at
    once, each until residual <= tol: as no eigenvalue of S exceeds 1, no entry of F is then further than
    tol max|Y| from the exact one. A larger residual is returned and warned of. An isolated node, whose row of
    S is zero, keeps its prior: F_i = Y_i. Rows c where clamp (N,) is true are anchors; the others, u, solve
        F_c = Y_c,   F_u = (I - alpha S_uu)^-1 ((1 - alpha) Y_u + alpha S_uc Y_c),
    as alpha -> 1 the harmonic function of the normalised Laplacian. ValueError: alpha outside [0, 1); Y not
    (N, M), empty, NaN, infinite.
    """
    Y = torch.as_tensor(Y).to(S.device, torch.float64)
    if not 0 <= alpha < 1:
        raise ValueError(f"propagate: alpha must lie in [0, 1), got {alpha}")
    if Y.ndim != 2 or len(Y) != len(S) or 0 in Y.shape or not Y.isfinite().all():
        raise ValueError(f"propagate: Y must be finite ({len(S)}, M), not empty, got shape {tuple(Y.shape)}")
    F, S, scale = Y.clone(), S.double(), (1 - alpha) * Y.abs().amax(0)          # (N, M), (N, N), (M,)
    free = (S @ Y.new_ones(len(S), 1) > 0).double()                             # (N, 1)
    crow, col, value = S.crow_indices(), S.col_indices(), S.values()            # (E,) the last two
    if clamp is not None:
        free[torch.as_tensor(clamp, dtype=torch.bool, device=S.device)] = 0
        value = value * (free[:, 0].repeat_interleave(crow.diff()) * free[col, 0])
    # S_uu, other rows zero; 64-bit indices would be copied to 32 bits in every product
    inner = torch.sparse_csr_tensor(crow.int(), col.int(), value, S.shape, check_invariants=False)
    R = free * (alpha * (S @ Y - Y))                # (N, M): the residual at F = Y, zero for alpha = 0
    P, rr, goal, iterations = R.clone(), (R * R).sum(0), (tol * scale) ** 2, 0
    while (rr > goal).any() and iterations < max_iter:
        Q = torch.addmm(P, inner, P, alpha=-alpha)                  # (I - alpha S_uu) P
        step = torch.where(rr > goal, rr / (P * Q).sum(0), 0)       # (M,): a converged column stands still
        F.addcmul_(step, P)
        R.addcmul_(step, Q, value=-1)
        rr, last, iterations = (R * R).sum(0), rr, iterations + 1
        P.mul_(torch.where(rr > goal, rr / last, 0)).add_(R)
    R = free * ((1 - alpha) * Y + alpha * (S @ F) - F)
    residual = torch.where(scale > 0, R.norm(dim=0) / scale, 0).max().item()
    if residual > tol:
        warnings.warn(f"propagate: residual {residual:.1e} > tol {tol:.0e} at step {iterations}/{max_iter}")
    return Propagation(F, iterations, residual)
