"""The CUDA kernels of soft sort and soft rank, executed on the host, beside pooling in plain fp64.

Builds of 64 and 256 threads to a block (of these kernels: twice that), one whose shared memory is so small that rows
take the long way, and some that leave a barrier out, which must be caught.
"""

import faulthandler
import math
import os
import signal

import pytest
import torch

pytest.importorskip("fusedloss._native", reason="the native extension fusedloss._native is not built")
import host_cuda  # noqa: E402  (needs the extension too)

from fusedloss import _native  # noqa: E402

pytestmark = [pytest.mark.host, pytest.mark.skipif(host_cuda.missing() is not None, reason=str(host_cuda.missing()))]

INF, NAN = math.inf, math.nan
F64 = 3
DTYPES = {torch.float32: _native.F32, torch.bfloat16: _native.BF16, torch.float16: _native.F16, torch.float64: F64}
# Of fp64: a soft rank by log-sum-exps is exp of a difference that carries log2(n) fewer bits.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 4e-11}
WAYS = {"64": (64, 227 << 10), "256": (256, 227 << 10), "long": (64, 2560, "FL_SORTED_CHUNK=64")}
BARRIERS = ("reduction", "sorted", "scanned", "marked", "pooled")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder, built = tmp_path_factory.mktemp("permutahedron"), {}

    def library(way, without="none"):
        if (way, without) not in built:
            threads, shared, *more = WAYS[way]
            defines = (
                *more,
                f"FL_MOST_THREADS={threads}",
                f"FL_HOST_DYNAMIC_SHARED={shared}",
                f"FL_WITHOUT_BARRIER={without}",
            )
            sources, others = host_cuda.SORTING, ()
            if without != "none":  # of the short rows' kernels alone, which use all the barriers
                library(way)
                sources, others = sources[:1], [folder / f"{way}_none_{source.stem}.o" for source in sources[1:]]
            name = f"{way}_{without}"
            built[way, without] = host_cuda.build(
                folder, name, *defines, sources=sources, others=others, optimized="-O1"
            )
        built[way, without].seed(1)
        return built[way, without]

    return library


@pytest.fixture(autouse=True)
def one_thread():
    """Nothing here is large enough for more, and threads do not outlive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=WAYS)
def kernels(request, libraries):
    return libraries(request.param)


# ---- the truth -------------------------------------------------------------------------------------------------------


def blocks(v, strength, sort, kl, counted, begin):
    """[(start, end)] of the finite items v, which fall and are `counted - begin - k` from the row's end."""

    def weight(k):
        return counted - begin - k

    def lse(values):
        top = max(values)
        return top + math.log(math.fsum(math.exp(u - top) for u in values))

    def level(a, b):
        s = v[a:b] if sort else [u / strength for u in v[a:b]]
        w = [weight(k) / strength if sort else weight(k) for k in range(a, b)]
        if kl:
            difference = lse(s) - (lse(w) if sort else math.log(math.fsum(w)))
        else:
            difference = (math.fsum(s) - math.fsum(w)) / (b - a)
        return -difference if sort else difference

    found = []
    for k in range(len(v)):
        found.append((k, k + 1, level(k, k + 1) if strength else None))
        while len(found) > 1:
            (a, b, left), (_, c, right) = found[-2:]
            tied = not sort and v[b - 1] == v[b]
            if not tied and (strength == 0 or left > right):
                break
            found[-2:] = [(a, c, level(a, c) if strength else None)]
    return [(a, b) for a, b, _ in found]


def truth(x, strength, sort, kl, descending):
    """Outputs of one fp64 row without a mask, differentiable in x and in a strength > 0; the starts of its blocks."""
    sign = 1 if sort == descending else -1
    order = sorted(range(len(x)), key=lambda i: -sign * x[i].item())
    v = (sign * x)[order]
    e = strength.item()
    finite = [k for k in range(len(x)) if v[k].isfinite()]
    begin, end, m = (finite[0], finite[-1] + 1, len(x)) if finite else (int((v > 0).sum()),) * 2 + (len(x),)
    weights = torch.arange(m, 0, -1, dtype=torch.float64)
    found = [(begin + a, begin + b) for a, b in blocks(v[begin:end].tolist(), e, sort, kl, m, begin)]
    infinite = [(k, k + 1) for k in (*range(begin), *range(end, m))]
    if not sort:
        infinite = [(a, b) for a, b in ((0, begin), (end, m)) if b > a]
    parts = []
    for a, b in sorted(found + infinite):
        w = weights[a:b] / strength if sort and e else weights[a:b]
        if (a, b) in infinite:
            parts.append(v[a:b] if sort else w.mean().expand(b - a))
        elif b - a == 1:
            parts.append(v[a:b] if sort else w)
        elif sort:
            parts.append(w - w.logsumexp(0) + v[a:b].logsumexp(0) if kl else w - w.mean() + v[a:b].mean())
        elif e == 0:
            parts.append(w.mean().expand(b - a))
        else:
            s = v[a:b] / strength
            parts.append(s.softmax(0) * w.sum() if kl else w.mean() + (s - s.mean()))
    y = torch.cat(parts) if parts else x
    if not sort:
        y = torch.zeros_like(x).index_put((torch.tensor(order, dtype=torch.int64),), y)
    return (sign * y if sort else y), order, [a for a, _ in sorted(found + infinite)]


# ---- calling ---------------------------------------------------------------------------------------------------------


def pointer(t):
    return 0 if t is None else t.data_ptr()


class Soft:
    """A problem's tensors, and the kernels' answers."""

    def __init__(
        self, x, offsets, width, strengths=None, strength=1.0, sort=False, kl=False, descending=False, mask=None
    ):
        """`width`: with offsets of unequal steps, the longest row or more."""
        self.x, self.offsets, self.mask, self.strengths = x, offsets, mask, strengths
        self.rows, self.name = len(offsets) - 1, "soft_sort" if sort else "soft_rank"
        at = torch.tensor(offsets)
        self.kept = at, mask
        ragged = any(b - a != width for a, b in zip(offsets, offsets[1:]))
        where = pointer(at) if ragged else 0, pointer(mask), pointer(strengths)
        what = strength, DTYPES[x.dtype], kl, descending, len(x) if ragged else 0
        self.problem = _native.Permutahedron(self.rows, width, *where, *what)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.out = torch.full(x.shape, NAN, dtype=x.dtype if sort else wide)
        self.order = torch.full(x.shape, 7, dtype=torch.int32)

    def run(self, library, name, *tensors):
        with host_cuda.Workspace(library.cuda_soft_workspace(name, self.problem)) as memory:
            library.cuda_soft(name, self.problem, *map(pointer, tensors), *memory)

    def forward(self, library):
        self.run(library, self.name, self.x, self.out, self.order)
        return self

    def backward(self, library, g):
        self.dx, self.dstrength = (
            torch.full(self.x.shape, NAN, dtype=self.x.dtype),
            torch.full((self.rows,), NAN).double(),
        )
        self.run(library, f"{self.name}_backward", self.x, self.order, g, self.dx, self.dstrength)
        return self


def close(got, exact, rounding, what):
    got, exact = got.double(), exact.double()
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite) and torch.equal(
        got.nan_to_num(3)[~finite], exact.nan_to_num(3)[~finite]
    ), what
    if finite.any():
        error, size = (got - exact)[finite].abs().max().item(), exact[finite].abs().max().item()
        assert error <= rounding * size + 1e-300, f"{what}: error {error:.3g} of {size:.3g}"


def check(library, rows, dtype=torch.float32, strengths=None, mask=None, seed=0, starts=True, width=0, **options):
    """Forward and backward of rows (lists or tensors), each beside its truth."""
    rows = [torch.as_tensor(row, dtype=torch.float64).to(dtype) for row in rows]
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row))
    each = strengths or [options.pop("strength", 1.0)] * len(rows)
    given = None if strengths is None else torch.tensor(strengths, dtype=torch.float64)
    x = torch.cat(rows) if rows else torch.empty(0, dtype=dtype)
    counts = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    poisoned = x.masked_fill(~counts, NAN)
    soft = Soft(poisoned, offsets, max([width, *map(len, rows)]), given, each[0] if rows else 1.0,
                mask=None if mask is None else mask.to(torch.uint8), **options)  # fmt: skip
    soft.forward(library)
    g = torch.randn(len(x), generator=torch.Generator().manual_seed(seed)).to(soft.out.dtype)
    held = g.clone()
    if not options.get("sort"):
        held[~counts] = NAN
    soft.backward(library, held)
    options = {name: options.get(name, False) for name in ("sort", "kl", "descending")}
    for i, (a, b) in enumerate(zip(offsets, offsets[1:])):
        mine = counts[a:b].nonzero()[:, 0]
        leaf, e = x[a:b][mine].double().requires_grad_(), torch.tensor(each[i], dtype=torch.float64).requires_grad_()
        y, order, begins = truth(leaf, e, **options)
        m = len(mine)
        where = torch.arange(a, a + m) if options["sort"] else a + mine
        rounding = ROUNDING[soft.out.dtype]
        close(soft.out[where], y.detach(), rounding, f"row {i}")
        others = torch.ones(b - a, dtype=torch.bool)
        others[where - a] = False
        assert (soft.out[a:b][others] == 0).all() and (soft.dx[a:b][~counts[a:b]] == 0).all()
        kept = soft.order[a:b]
        rest = (~counts[a:b]).nonzero()[:, 0].tolist()
        assert (kept & 0x7FFFFFFF).tolist() == mine[order].tolist() + rest
        if starts:
            assert (kept < 0).nonzero()[:, 0].tolist() == begins + list(range(m, b - a))
        wanted = (
            torch.autograd.grad(y, (leaf, e), g[where].double(), allow_unused=True) if y.requires_grad else (None, None)
        )
        dx, de = (torch.zeros_like(t) if d is None else d for t, d in zip((leaf, e), wanted))
        rounding = max(ROUNDING[dtype], 2 * rounding)
        close(soft.dx[a:b][counts[a:b]], dx.nan_to_num(0), rounding, f"dx of row {i}")
        if each[i] == 0:
            assert soft.dstrength[i] == 0
            continue
        size = (dx.nan_to_num(0) * leaf.detach().nan_to_num(0, 0, 0)).abs().sum() / each[i]
        if options["sort"]:
            size = g[where].double().abs().sum() * m / each[i] ** 2
        assert abs(soft.dstrength[i].item() - de.item()) <= 4 * ROUNDING[torch.float32] * size.item() + 1e-12, (
            f"de of row {i}"
        )
    return soft


def normal(n, seed=0, scale=1.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


OPERATORS = [dict(sort=sort, kl=kl, descending=d) for sort, kl, d in
             ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1))]  # fmt: skip
named = lambda o: ("sort" if o["sort"] else "rank") + (" kl" if o["kl"] else " l2") + " desc" * o["descending"]  # noqa: E731
operators = pytest.mark.parametrize("operator", [{k: bool(v) for k, v in o.items()} for o in OPERATORS], ids=named)


@operators
@pytest.mark.parametrize("strength", [1.0, 1e-3, 30.0, 0.0])
def test_sizes(kernels, operator, strength):
    rows = [normal(n, n) for n in (0, 1, 2, 5, 31, 32, 33, 64, 100, 301, 0)]
    check(kernels, rows, strength=strength, **operator)


@operators
def test_many_rows_of_other_strengths_and_masks(kernels, operator):
    rows = [normal(n, n, 3) for n in (40, 1, 150, 0, 64, 257)]
    mask = torch.rand(sum(map(len, rows)), generator=torch.Generator().manual_seed(2)) < 0.6
    mask[40] = False
    for width in (0, len(mask)):
        check(kernels, rows, strengths=[0.3, 1.0, 1e-2, 1.0, 0.0, 5.0], mask=mask, width=width, **operator)
    check(kernels, rows, dtype=torch.float64, strength=0.3, width=2000, **operator)


@operators
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(kernels, operator, dtype):
    """Coarse values tie."""
    check(kernels, [normal(n, n) for n in (70, 300)], dtype=dtype, strength=0.25, **operator)


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("strength", [0.0, 1e-6, 0.1, 1.0])
def test_ties(kernels, operator, strength, dtype):
    values = torch.tensor([0.1, 0.3, -0.7, 1e6 + 0.25, 0.0, -0.0])
    rows = [values[torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(n))] for n in (6, 90, 260)]
    check(
        kernels, [*rows, torch.full((200,), 0.1)], dtype=dtype, strength=strength, starts=strength != 1e-6, **operator
    )


@operators
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_infinities_and_nan(kernels, operator, strength):
    few = torch.tensor([1.0, INF, -2.0, -INF, 0.5, INF, 0.4, -INF, -INF])
    many = normal(200)
    many[::7], many[3::11] = INF, -INF
    rows = [few, many, torch.full((70,), INF), torch.tensor([-INF, INF]), torch.tensor([-INF, 3.0])]
    check(kernels, rows, strength=strength, **operator)
    x = torch.cat([torch.randn(50), torch.tensor([1.0, NAN, -INF]), torch.randn(70)])
    soft = Soft(x, [0, 40, 53, 123], 70, strength=strength, **operator)
    soft.forward(kernels).backward(kernels, torch.ones_like(soft.out))
    for found in (soft.out, soft.dx):
        assert found[40:53].isnan().all() and found[:40].isfinite().all() and found[53:].isfinite().all()
    assert soft.dstrength.isnan().tolist() == [False, True, False]
    wrong = Soft(x[:40].repeat(2), [0, 40, 80], 40, torch.tensor([-1.0, 1.0], dtype=torch.float64), **operator)
    wrong.forward(kernels).backward(kernels, torch.ones_like(wrong.out))
    for found in (wrong.out, wrong.dx):
        assert found[:40].isnan().all() and found[40:].isfinite().all()
    assert sorted((soft.order[40:53] & 0x7FFFFFFF).tolist()) == list(range(13))


def adversarial(n):
    """Rows, as values in falling order, that make merging walk far: {name: (values, strength)}."""
    k = torch.arange(n, dtype=torch.float64)
    gaps = torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2
    return {
        "one_pool": (normal(n), 1e3),
        "critical": (normal(n), 5.0 / n),
        "gaps_about_the_strength": (-gaps.cumsum(0), 1.0),
        "alternating": (-(k + 0.9 * (k % 2)), 0.95),
        "growing_gaps": (-(k * k) / n, 1.0),
        "shrinking_gaps": (-(k * n - k * k / 2) / n, 0.5),
        "hull_that_falls_at_the_last": (torch.cat([-1.01 * k[:-1], torch.tensor([-1.01 * (n - 1) + n / 3.0])]), 1.0),
        "far": (torch.cat([1e6 + normal(n // 2), normal(n - n // 2, 1, 1e-6)]), 1e-7),
    }


@operators
@pytest.mark.parametrize("case", adversarial(8))
def test_adversarial(kernels, operator, case):
    values, strength = adversarial(700)[case]
    strength = strength if not operator["sort"] else 1 / strength
    dtype = torch.float64
    check(kernels, [values, values[:131].flip(0)], dtype=dtype, strength=strength, starts=False, **operator)


@pytest.mark.parametrize("operator", [{}, dict(kl=True), dict(sort=True)], ids=["rank", "rank kl", "sort"])
def test_long_rows(kernels, operator):
    for n, strength in ((1000, 3e-3), (5000, 1e-3)):
        strength = strength if not operator.get("sort") else 1 / strength
        check(kernels, [normal(n)], strength=strength, **operator)


def test_empty(kernels):
    check(kernels, [])
    check(kernels, [[], []])


# ---- the way taken, order, barriers, errors --------------------------------------------------------------------------


def test_which_way_rows_go(libraries):
    def workspace(way, n, dtype=torch.float32, name="soft_rank", **options):
        x = torch.empty(n, dtype=dtype)
        return libraries(way).cuda_soft_workspace(name, Soft(x, [0, n], n, **options).problem)

    for kl in (False, True):  # what fits in 227 KB
        assert workspace("256", 24000, kl=kl) == 0 == workspace("256", 18500, name="soft_rank_backward", kl=kl)
        assert workspace("256", 18000, torch.float64, kl=kl) == 0 < workspace("256", 30000, kl=kl)
        assert workspace("long", 100, kl=kl) > 0


def battery(library, seed):
    """Something of everything that threads tell one another; checked, and its bits for comparison."""
    library.seed(seed)
    found = []
    for operator in ({}, dict(kl=True), dict(sort=True), dict(sort=True, kl=True)):
        for n, strength in ((700, 0.02), (1300, 0.3)):
            strength = strength if not operator.get("sort") else 1 / strength
            soft = check(library, [normal(n, n), normal(n // 2, 3)], strength=strength, **operator)
            found += [soft.out, soft.order, soft.dx, soft.dstrength]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_threads_does_not_change_a_bit(libraries, way):
    for one, two in zip(battery(libraries(way), 1), battery(libraries(way), 2), strict=True):
        assert torch.equal(one, two)


def survives(work, seconds=120):
    """In a process of its own: what threads take for an index may be anything; a crash or no end is noticed too."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_noticed(libraries, barrier):
    assert survives(lambda: battery(libraries("64"), 0))
    library = libraries("64", barrier)
    assert not survives(lambda: [battery(library, seed) for seed in range(3)])


def test_what_is_refused(kernels):
    soft = Soft(torch.randn(100), [0, 100], 100, strength=-1.0)
    with pytest.raises(RuntimeError, match="strength is -1, expected 0 or more"):
        soft.forward(kernels)
    with pytest.raises(RuntimeError, match="dtype 9 is unknown"):
        kernels.cuda_soft("soft_rank", _native.Permutahedron(1, 5, 0, 0, 0, 1.0, 9, False, False), 0, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="an array of items is null"):
        kernels.cuda_soft("soft_rank", _native.Permutahedron(1, 5, 0, 0, 0, 1.0, 0, False, False), 0, 0, 0, 0, 0, 0)


def test_a_long_row_without_its_workspace_is_refused(libraries):
    soft = Soft(torch.randn(1000), [0, 1000], 1000)
    with pytest.raises(RuntimeError, match="workspace is null"):
        libraries("long").cuda_soft(
            "soft_rank", soft.problem, pointer(soft.x), pointer(soft.out), pointer(soft.order), 0, 0, 0
        )
