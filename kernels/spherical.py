"""What a step of the factored layer does beside its products: fusedloss/spherical/steps.py in a few launches.

Numbers of a row and all that is d × d are float64, matrices of m rows are of P's type. A number of the host is a pair
of fp32 ones, whose sum has 48 bits: one argument has 24. Matrices are contiguous, but for P. Not run on a GPU so far.
"""

import triton
import triton.language as tl

from .scores import wide

SQUARED_ERROR = tl.constexpr(0)
SPHERICAL_SOFTMAX = tl.constexpr(1)
TAYLOR_SOFTMAX = tl.constexpr(2)
SPHERICAL_Z = tl.constexpr(3)


@triton.jit
def number(pair):
    return tl.full([], 0, tl.float64) + pair[0] + pair[1]


# --- the losses, in float64 ------------------------------------------------------------------------------------------


@triton.jit
def log1p(x):
    """log(1 + x) for x > −1: what rounding 1 + x took away is given back."""
    u = x + 1.0
    kept = u - 1.0
    return tl.where(kept == x, tl.log(u), tl.where(kept == 0, x, tl.log(u) * (x / tl.where(kept == 0, 1.0, kept))))


@triton.jit
def taylor(s):
    return ((s + 1.0) * (s + 1.0) + 1.0) * 0.5


@triton.jit
def total_of(mean, squares, classes, options, LOSS: tl.constexpr):
    """T of the two losses that are quotients."""
    if LOSS == SPHERICAL_SOFTMAX:
        return squares + classes * (mean * mean + number(options[0]))
    else:
        return classes * taylor(mean) + squares * 0.5


@triton.jit
def deviation_of(squares, classes, options):
    """(whether the row's scores vary, their deviation or 1) of the Z-loss."""
    variance, least = squares / classes, number(options[2])
    varied = variance > least * least
    return varied, tl.sqrt(tl.where(varied, variance, 1.0))


@triton.jit
def of_targets(hit, share, mean, squares, classes, options, LOSS: tl.constexpr):
    """Of some targets of a row: (losses, α, what else γ is a sum of)."""
    at = hit + mean
    if LOSS == SQUARED_ERROR:
        value, k = number(options[0]), number(options[1])
        part, apart = share / number(options[2]), at - value
        return part * (k * apart * apart - at * at), 2.0 * part * (k * apart - at), tl.where(share > 0, 1.0, 0.0)
    elif LOSS == SPHERICAL_Z:
        a = number(options[0])
        varied, deviation = deviation_of(squares, classes, options)
        zeta = tl.where(varied, hit, 0.0) / deviation
        u = a * (number(options[1]) - zeta)
        e = tl.exp(-tl.abs(u))
        slope = -share * (tl.where(u < 0, e, 1.0) / (e + 1.0))
        softplus = tl.where(u < 0, 0.0, u) + log1p(e)
        return share * softplus / a, tl.where(varied, slope / deviation, 0.0), slope * zeta
    else:
        if LOSS == SPHERICAL_SOFTMAX:
            term, slope = at * at + number(options[0]), 2.0 * at
        else:
            term, slope = taylor(at), at + 1.0
        total = total_of(mean, squares, classes, options, LOSS)
        return share * log1p((total - term) / term), -share * slope / term, tl.zeros_like(hit)


@triton.jit
def of_row(shares, alphas, others, mean, squares, classes, options, LOSS: tl.constexpr):
    """From the sums over a row's targets: (the loss's part that no target has alone, t, γ)."""
    zero = tl.full([], 0, tl.float64)
    if LOSS == SQUARED_ERROR:
        gamma = shares / tl.where(others < 1, 1.0, others) / number(options[2])
        return gamma * (squares + classes * mean * mean), alphas + 2.0 * classes * mean * gamma, gamma
    elif LOSS == SPHERICAL_Z:
        varied, _ = deviation_of(squares, classes, options)
        return zero, zero, -others / (2.0 * tl.where(varied, squares, 1.0))
    else:
        part = shares / total_of(mean, squares, classes, options, LOSS)
        if LOSS == SPHERICAL_SOFTMAX:
            return zero, alphas + part * (2.0 * classes * mean), part
        else:
            return zero, alphas + part * (classes * (mean + 1.0)), part * 0.5


# --- forward and backward: a program has a row -----------------------------------------------------------------------


@triton.jit
def visit(p, p_stride, offset, mean, h, hq, hu, target, share, losses, alpha, t, gamma, picked, classes, width, targets,
          options, LOSS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Target rows gathered once and looked at twice: a = P[c] · (H Uᵀ) + h · δ, the loss, its derivatives, Σ α P[c]."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    squares, middle, along = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for begin in range(0, width, BLOCK):
        d = begin + lane
        x = tl.load(h + row * width + d, mask=d < width, other=0.0).to(tl.float64)
        squares += x * tl.load(hq + row * width + d, mask=d < width, other=0.0).to(tl.float64)
        middle += x * tl.load(mean + d, mask=d < width, other=0.0)
        along += x * tl.load(offset + d, mask=d < width, other=0.0)
    middle, along, n = tl.sum(middle, 0), tl.sum(along, 0), tl.full([], 0, tl.float64) + classes
    squares = tl.sum(squares, 0)
    squares = tl.where(squares < 0, 0.0, squares)  # NaN stays
    zero = tl.full([], 0, tl.float64)
    loss, shares, alphas, others = zero, zero, zero, zero
    for first in range(0, targets, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        weight = tl.load(share + row * targets + slot, mask=slot < targets, other=0.0)
        asked = weight != 0
        at = tl.load(target + row * targets + slot, mask=asked, other=0) * p_stride
        hit = tl.zeros([SLOTS], tl.float64)
        for begin in range(0, width, BLOCK):
            d = begin + lane
            rows = tl.load(p + at[:, None] + d[None, :], mask=asked[:, None] & (d < width)[None, :], other=0.0)
            x = tl.load(hu + row * width + d, mask=d < width, other=0.0).to(tl.float64)
            hit += tl.sum(rows.to(tl.float64) * x[None, :], 1)
        loss_k, alpha_k, other_k = of_targets(hit + along, weight, middle, squares, n, options, LOSS)
        tl.store(alpha + row * targets + slot, alpha_k, mask=slot < targets)
        loss += tl.sum(loss_k, 0)
        shares += tl.sum(weight, 0)
        alphas += tl.sum(alpha_k, 0)
        others += tl.sum(tl.where(asked, other_k, 0.0), 0)
        for begin in range(0, width, BLOCK):
            d = begin + lane
            rows = tl.load(p + at[:, None] + d[None, :], mask=asked[:, None] & (d < width)[None, :], other=0.0)
            part = tl.sum(alpha_k.to(rows.dtype)[:, None] * rows, 0)
            before = tl.load(picked + row * width + d, mask=(d < width) & (first > 0), other=0.0)
            tl.store(picked + row * width + d, before + part, mask=d < width)
        tl.debug_barrier()  # the next targets are added by any thread
    rest, t_row, gamma_row = of_row(shares, alphas, others, middle, squares, n, options, LOSS)
    tl.store(losses + row, loss + rest)
    tl.store(t + row, t_row)
    tl.store(gamma + row, gamma_row)


@triton.jit
def backward(upstream, alpha, t, gamma, offset, mean, hq, picked, alpha_out, t_out, gamma_out, yw, gh, dh, width,
             targets, SLOTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """`picked` are Σ α P[c] U; all times the upstream gradient: Σ α (w − m̄), 2γ H Q + that, and ∂L/∂H."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    up, total = tl.load(upstream + row).to(tl.float64), tl.full([], 0, tl.float64)
    for first in range(0, targets, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        a = tl.load(alpha + row * targets + slot, mask=slot < targets, other=0.0) * up
        tl.store(alpha_out + row * targets + slot, a, mask=slot < targets)
        total += tl.sum(a, 0)
    t_row, gamma_row = tl.load(t + row) * up, tl.load(gamma + row) * up
    tl.store(t_out + row, t_row)
    tl.store(gamma_out + row, gamma_row)
    for begin in range(0, width, BLOCK):
        d = begin + lane
        at, here = row * width + d, d < width
        y = up * tl.load(picked + at, mask=here, other=0.0) + total * tl.load(offset + d, mask=here, other=0.0)
        g = 2.0 * gamma_row * tl.load(hq + at, mask=here, other=0.0) + y
        tl.store(yw + at, y.to(yw.dtype.element_ty), mask=here)
        tl.store(gh + at, g.to(gh.dtype.element_ty), mask=here)
        g += t_row * tl.load(mean + d, mask=here, other=0.0)
        tl.store(dh + at, g.to(dh.dtype.element_ty), mask=here)


# --- the step --------------------------------------------------------------------------------------------------------


@triton.jit
def prepare(alpha, t, gamma, target, h, yw, gh, offset, keys, hg, twice, weights, classes, rows, width, targets,
            SLOTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program has a row: 2γ H, GH + YW, and what H is summed up with; targets that count nothing are class n."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    total = tl.full([], 0, tl.float64)
    for first in range(0, targets, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        at, here = row * targets + slot, slot < targets
        a = tl.load(alpha + at, mask=here, other=0.0).to(tl.float64)
        total += tl.sum(a, 0)
        tl.store(keys + at, tl.where(a == 0, classes, tl.load(target + at, mask=here, other=0)), mask=here)
    two, along = 2.0 * tl.load(gamma + row), tl.zeros([BLOCK], tl.float64)
    for begin in range(0, width, BLOCK):
        d = begin + lane
        at, here = row * width + d, d < width
        x = tl.load(h + at, mask=here, other=0.0).to(tl.float64)
        along += x * tl.load(offset + d, mask=here, other=0.0)
        tl.store(hg + at, (two * x).to(hg.dtype.element_ty), mask=here)
        both = tl.load(gh + at, mask=here, other=0.0) + tl.load(yw + at, mask=here, other=0.0)
        tl.store(twice + at, both, mask=here)
    tl.store(weights + row, two * tl.sum(along, 0) - total / classes)
    tl.store(weights + rows + row, tl.load(t + row))
    tl.store(weights + 2 * rows + row, total)


@triton.jit
def column_sums(h, weights, sums, rows, width, part_rows, R: tl.constexpr, BLOCK: tl.constexpr):
    """Hᵀ times the three weights, over part p of the rows: sums (parts, 3, d)."""
    d, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    first, second, third = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    end = tl.minimum(rows, (part + 1) * part_rows)
    for begin in range(part * part_rows, end, R):
        row = begin + tl.arange(0, R)
        at = row.to(tl.int64)[:, None] * width + d[None, :]
        x = tl.load(h + at, mask=(row < end)[:, None] & (d < width)[None, :], other=0.0).to(tl.float64)
        first += tl.sum(x * tl.load(weights + row, mask=row < end, other=0.0)[:, None], 0)
        second += tl.sum(x * tl.load(weights + rows + row, mask=row < end, other=0.0)[:, None], 0)
        third += tl.sum(x * tl.load(weights + 2 * rows + row, mask=row < end, other=0.0)[:, None], 0)
    sums += part * 3 * width + d
    tl.store(sums, first, mask=d < width)
    tl.store(sums + width, second, mask=d < width)
    tl.store(sums + 2 * width, third, mask=d < width)


@triton.jit
def grams(product, half, gamma, weights, m, rows, classes, lr, keep, BLOCK: tl.constexpr):
    """For m < d. H Hᵀ ← E = keep − lr H Hᵀ 2Γ; M = ½ (half + halfᵀ) − ȳ ȳᵀ / n."""
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, across = i[:, None] * rows + j[None, :], j[None, :] * rows + i[:, None]
    here = (i < rows)[:, None] & (j < rows)[None, :]
    two = 2.0 * tl.load(gamma + j, mask=j < rows, other=0.0)
    e = tl.where(i[:, None] == j[None, :], number(keep), 0.0)
    e -= number(lr) * two[None, :] * tl.load(product + at, mask=here, other=0.0)
    tl.store(product + at, e.to(product.dtype.element_ty), mask=here)
    both = tl.load(half + at, mask=here, other=0.0) + tl.load(half + across, mask=here, other=0.0)
    left = tl.load(weights + 2 * rows + i, mask=i < rows, other=0.0)
    right = tl.load(weights + 2 * rows + j, mask=j < rows, other=0.0)
    found = 0.5 * both - left[:, None] * right[None, :] / classes
    tl.store(m + at, found.to(m.dtype.element_ty), mask=here)


@triton.jit
def state(u, inverse, gram, change_u, change_inverse, change_gram, sizes, width, lr, keep, BLOCK: tl.constexpr):
    """U ← keep U − lr A, U⁻¹ ← (U⁻¹ + lr B) / keep, Q ← keep² Q − C − Cᵀ. Each program leaves Σ U² and Σ (U⁻¹)² in
    sizes (2, programs)."""
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, across = i[:, None] * width + j[None, :], j[None, :] * width + i[:, None]
    here = (i < width)[:, None] & (j < width)[None, :]
    by, kept = number(lr), number(keep)
    new = kept * tl.load(u + at, mask=here, other=0.0) - by * tl.load(change_u + at, mask=here, other=0.0)
    tl.store(u + at, new, mask=here)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sizes + program, tl.sum(tl.sum(new * new, 1), 0))
    new = tl.load(inverse + at, mask=here, other=0.0) + by * tl.load(change_inverse + at, mask=here, other=0.0)
    new = tl.where(here, new / kept, 0.0)
    tl.store(inverse + at, new, mask=here)
    tl.store(sizes + tl.num_programs(0) * tl.num_programs(1) + program, tl.sum(tl.sum(new * new, 1), 0))
    change = tl.load(change_gram + at, mask=here, other=0.0).to(tl.float64)
    change += tl.load(change_gram + across, mask=here, other=0.0)
    tl.store(gram + at, kept * kept * tl.load(gram + at, mask=here, other=0.0) - change, mask=here)


@triton.jit
def ill(sizes, parts, width, limit, BLOCK: tl.constexpr):
    """1 where U is `ill` (fusedloss/spherical/factors.py), else 0."""
    lane = tl.arange(0, BLOCK)
    first, second = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for begin in range(0, parts, BLOCK):
        here = begin + lane < parts
        first += tl.load(sizes + begin + lane, mask=here, other=0.0)
        second += tl.load(sizes + parts + begin + lane, mask=here, other=0.0)
    both = tl.sqrt(tl.sum(first, 0)) * tl.sqrt(tl.sum(second, 0))
    size = tl.sum(first, 0) / width
    well = (both <= width * number(limit)) & (size >= 1e-12) & (size <= 64.0)
    return tl.where(well, 0, 1)


@triton.jit
def fold(p, p_stride, u, scratch, sizes, parts, classes, width, limit, R: tl.constexpr, BN: tl.constexpr,
         BK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """P ← P U in place where U is ill-conditioned; else nothing. A block of rows is made in `scratch` (programs, R, d),
    for all of it is read until its last column is done."""
    if ill(sizes, parts, width, limit, BLOCK) > 0:
        lane, depth, column = tl.arange(0, R), tl.arange(0, BK), tl.arange(0, BN)
        own = scratch + tl.program_id(0).to(tl.int64) * R * width + lane[:, None] * width
        for block in range(tl.program_id(0), tl.cdiv(classes, R), tl.num_programs(0)):
            row = wide(block) * R + lane
            mine = p + row[:, None] * p_stride
            for begin in range(0, width, BN):
                d = begin + column
                found = tl.zeros([R, BN], p.dtype.element_ty)
                for k in range(0, width, BK):
                    inner = k + depth
                    here = (row < classes)[:, None] & (inner < width)[None, :]
                    a = tl.load(mine + inner[None, :], mask=here, other=0.0)
                    at = inner[:, None] * width + d[None, :]
                    b = tl.load(u + at, mask=(inner < width)[:, None] & (d < width)[None, :], other=0.0)
                    found = tl.dot(a, b.to(a.dtype), found, input_precision="ieee", out_dtype=found.dtype)
                tl.store(own + d[None, :], found, mask=(d < width)[None, :])
            tl.debug_barrier()  # other threads made what this one copies
            for begin in range(0, width, BN):
                d = begin + column
                found = tl.load(own + d[None, :], mask=(d < width)[None, :], other=0.0)
                tl.store(mine + d[None, :], found, mask=(row < classes)[:, None] & (d < width)[None, :])
            tl.debug_barrier()  # and they copy it before this one makes the next


@triton.jit
def settle(u, inverse, offset, mean, sums, sum_parts, sizes, parts, folded, classes, width, lr, keep, limit,
           BLOCK: tl.constexpr, SIZES: tl.constexpr):  # fmt: skip
    """U and U⁻¹ ← 1 where P took U over, and whether it did; δ and m̄, whose changes are sums over examples."""
    away = ill(sizes, parts, width, limit, SIZES)
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if away > 0:
        at, here = i[:, None] * width + j[None, :], (i < width)[:, None] & (j < width)[None, :]
        one = tl.where(i[:, None] == j[None, :], 1.0, 0.0).to(tl.float64)
        tl.store(u + at, one, mask=here)
        tl.store(inverse + at, one, mask=here)
    if tl.program_id(0) == 0:
        tl.store(folded, away)  # by all of this row alike
        first, second = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for part in range(sum_parts):
            first += tl.load(sums + part * 3 * width + j, mask=j < width, other=0.0)
            second += tl.load(sums + part * 3 * width + width + j, mask=j < width, other=0.0)
        by, kept = number(lr), number(keep)
        tl.store(offset + j, kept * tl.load(offset + j, mask=j < width, other=0.0) - by * first, mask=j < width)
        second = by * second / classes
        tl.store(mean + j, kept * tl.load(mean + j, mask=j < width, other=0.0) - second, mask=j < width)


@triton.jit
def segments(keys, order, alpha, rows, instead, folded, out, out_stride, classes, count, width, targets, lr,
             ADD: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Σ α rows over the examples of each class, from targets sorted into `keys`, each from place `order`.

    Who has the first of a class owns it and sums up all of it, R at a time, in the order of the examples: no atomics,
    the same bits every time. ADD: out[class] −= lr Σ. Else out[place of the first] = Σ, and 0 at the other places. Of
    `instead` rather than `rows` where P was folded.
    """
    place, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + place)
    before = tl.load(keys + place - 1, mask=place > 0, other=-1)
    found = tl.zeros([BLOCK], out.dtype.element_ty)
    if (key != before) & (key < classes):
        other = tl.load(folded)
        at, more = place, place >= 0
        while more:
            entry = at + tl.arange(0, R)
            same = tl.load(keys + entry, mask=entry < count, other=-1) == key
            which = tl.load(order + entry, mask=same, other=0)
            a = tl.load(alpha + which, mask=same, other=0.0).to(found.dtype)
            row = (which // targets)[:, None] * width + d[None, :]
            here = same[:, None] & (d < width)[None, :]
            if other > 0:
                x = tl.load(instead + row, mask=here, other=0.0)
            else:
                x = tl.load(rows + row, mask=here, other=0.0)
            found += tl.sum(a[:, None] * x, 0)
            more = tl.min(same.to(tl.int32), 0) > 0
            at += R
        if ADD:
            to = out + key * out_stride + d
            new = tl.load(to, mask=d < width, other=0.0) - number(lr) * found
            tl.store(to, new.to(found.dtype), mask=d < width)
    if not ADD:
        tl.store(out + place * width + d, found, mask=d < width)
