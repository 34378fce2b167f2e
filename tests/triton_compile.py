"""Compiles the Triton kernels ahead of time, as the backend would launch them, and prints what they take: JSON lines.

A program of its own, because the kernels must be defined without the interpreter, and because no GPU is needed:
tests/test_triton_compile.py starts it and reads what it prints.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedloss.backends import triton_launch, triton_linear_gradient
from fusedloss.backends.tile import Across, Exponentials, Sums, Tile
from fusedloss.lists import Lists
from fusedloss.nn import SphericalSoftmaxLoss, SphericalZLoss, SquaredErrorLoss, TaylorSoftmaxLoss
from fusedloss.ranking import pairs_torch, pairs_triton
from fusedloss.relation import Other, Rest, Same
from fusedloss.sorting import permutation_triton, threshold_launches
from fusedloss.spherical import device_launches
from fusedloss.spherical.factors import Factors
from fusedloss.spherical.family import member
from fusedloss.spherical.steps import Batch, Visit
from fusedloss.statistics import (
    LOG_FUNCTIONS,
    Count,
    Expectation,
    LogSumExp,
    LogSumExpOf,
    Moments,
    Score,
    Sum,
    SumOf,
    SumOfSquares,
    TopK,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


def signature_of(value, path, constants, attributes):
    """The type of an argument as a launch would see it: multiples of 16 and the number 1 are told to the compiler."""
    if isinstance(value, tuple):
        return tuple(signature_of(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    if isinstance(value, torch.Tensor):
        if value.data_ptr() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "*" + NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        constants[path] = 1
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if abs(value) < 2**31 else "i64"


def compiled(launch, target):
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[(place,)] = "constexpr", launch.constants[name]
        else:
            signature[name] = signature_of(launch.arguments[name], (place,), constants, attributes)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=launch.options)


def takes(kernel) -> dict:
    """Registers and spilled bytes per thread, and shared memory, as the assembler tells them."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            told = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", told.stdout + told.stderr)
        registers, stack, local = map(int, found.groups())
        instructions = [w for w in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if w in kernel.asm["ptx"]]
        spilled = stack + local
    else:
        text = kernel.asm["amdgcn"]
        number = {w: int(re.search(rf"\.{w}:\s*(\d+)", text).group(1)) for w in
                  ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")}  # fmt: skip
        registers, spilled = number["vgpr_count"], number["vgpr_spill_count"] + number["private_segment_fixed_size"]
        instructions = ["mfma"] if "v_mfma" in text else []
    return dict(registers=registers, spilled=spilled, shared=kernel.metadata.shared, instructions=instructions)


def launches(hip: bool):
    """(title, launch) of the kernels at the sizes of a large language model's last layer. No memory is ever touched."""
    rows, columns, depth = 4096, 32768, 4096
    vector, scale = torch.empty(columns), torch.empty(())
    buffer, ids = torch.empty(rows, columns), torch.zeros(rows, dtype=torch.int64)
    half = buffer.view(torch.bfloat16)[:, :columns]
    plain = Tile(buffer)
    options = Tile(buffer, 0, vector, vector, vector, 30.0, scale)
    entropy = [LogSumExp(where=Rest(ids)), Score(ids)]
    lists = {
        "entropy": entropy,
        "smooth": [*entropy, Sum(vector), Count(vector)],
        "focal": [SumOf("focal", parameter=2.0, row=torch.empty(rows))],
        "others": [Expectation(vector, torch.empty(rows), power=2), Moments(), SumOfSquares()],
        "list": [TopK(5)],
    }
    none, every = Sums(), Sums(vector, vector, vector, scale, vector)

    def sums(asked):
        return triton_launch._ColumnSums(asked, rows, columns, torch.device("cpu"))

    for name, stats in lists.items():
        states = [s.identity(rows, "cpu") for s in stats]
        coefficients = [torch.empty(rows, s.outputs) for s in stats]
        for how, tile in (("", plain), (" with options", options)):
            yield from ((name + how, x) for x in triton_launch.statistics_launches(tile, stats, states))
            asked = sums(every if how and name == "entropy" else none)
            given = (tile, half, stats, states, coefficients, asked)
            yield from ((name + how, x) for x in triton_launch.gradient_launches(*given))
    states = [s.identity(rows, "cpu") for s in entropy]
    coefficients = [torch.empty(rows, 1) for _ in entropy]
    few = states[0][:8], states[1][:8]
    narrow = [LogSumExp(where=Rest(ids[:8])), Score(ids[:8])]
    yield from (("few rows", x) for x in triton_launch.statistics_launches(Tile(buffer[:8]), narrow, few))
    for block, name in ((4096, "kept"), (triton_launch.LINEAR_KEPT_COLUMNS, "kept by the product")):
        kept = Exponentials(half, torch.empty(columns // block, rows), block)
        if block == 4096:
            yield from ((name, x) for x in triton_launch.statistics_launches(plain, entropy, states, kept))
        given = (plain, kept, entropy, states, coefficients, sums(Sums(bias=vector)))
        yield from ((name, x) for x in triton_launch.exponentials_launches(*given))
    x, weight = torch.empty(rows, depth, dtype=torch.bfloat16), torch.empty(columns, depth, dtype=torch.bfloat16)
    for name, stats, keep in (("entropy", entropy, None), ("kept", entropy, kept), ("others", lists["others"], None)):
        states = [s.identity(rows, "cpu") for s in stats]
        for how, tile in (("", plain), (" with options", options)):
            given = triton_launch.linear_launches(x, weight, tile, stats, states, keep, hip=hip)
            yield from ((name + how, launch) for launch in given)
    for name, stats, how, tile, asked in (
        ("entropy", entropy, "", plain, none),
        ("entropy", entropy, " with options", options, every),
        ("others", lists["others"], " with options", options, every),
    ):
        given = [s.identity(rows, "cpu") for s in stats], [torch.empty(rows, s.outputs) for s in stats], sums(asked)
        launched = triton_linear_gradient.launches(x, weight, tile, half, stats, *given, hip=hip)
        yield from ((name + how, launch) for launch in launched)
    yield from similarity_launches(hip)
    yield from spherical_launches()
    yield from threshold_rows_launches()
    yield from pair_launches()
    yield from permutation_launches()


def similarity_launches(hip: bool):
    """The same of a block of similarities: relations by label, functions under the logarithm, statistics of columns."""
    rows, columns, depth = 4096, 8192, 1024
    buffer, ids, classes = torch.empty(rows, columns), torch.zeros(rows, dtype=torch.int64), torch.zeros(columns).long()
    half, scale, shift = buffer.view(torch.bfloat16)[:, :columns], torch.empty(()), torch.empty(columns)
    tile = Tile(buffer, 0, None, None, shift, 0.0, scale)
    limits = dict(above=torch.empty(rows), below=torch.empty(rows))
    entropy = [LogSumExp(where=Rest(ids)), Score(ids)]
    lists = {
        "labels": [LogSumExp(where=Other(ids, classes)), Count(where=Same(ids, classes))],
        "pairs": [LogSumExpOf("circle", where=Same(ids, classes, without=ids, **limits)), SumOf("softplus")],
        "mined": [TopK(1, where=Other(ids, classes))],
        **{name: [LogSumExpOf(name, row=torch.empty(rows))] for name in LOG_FUNCTIONS if name != "circle"},
    }
    across = {
        "entropy": [LogSumExp(where=Rest(classes)), Score(classes)],
        "labels": [LogSumExp(where=Other(classes, ids)), SumOf("softplus", where=Same(classes, ids))],
        "others": [Expectation(), Moments(), SumOfSquares()],
        "list": [TopK(5)],
    }

    def states(stats, count):
        return [s.identity(count, "cpu") for s in stats]

    def coefficients(stats, count):
        return [torch.empty(count, s.outputs) for s in stats]

    def sums(asked):
        return triton_launch._ColumnSums(asked, rows, columns, torch.device("cpu"))

    both = sums(Sums(class_shift=shift, scale=scale))
    for name, stats in lists.items():
        name, given = f"{name} with options", (stats, states(stats, rows))
        yield from ((name, x) for x in triton_launch.statistics_launches(tile, *given))
        given = tile, half, *given, coefficients(stats, rows), both
        yield from ((name, x) for x in triton_launch.gradient_launches(*given))
    for name, stats in across.items():
        title, of_columns = f"{name} of columns", states(stats, columns)
        launched = triton_launch.statistics_launches(tile, stats, of_columns, transposed=True)
        yield from ((title, x) for x in launched)
        beside = lists.get(name, entropy)
        given = tile, half, beside, states(beside, rows), coefficients(beside, rows)
        below = Across(stats, of_columns, coefficients(stats, columns))
        for asked in (sums(Sums()), both) if name in ("entropy", "labels") else (both,):
            yield from ((title, x) for x in triton_launch.gradient_launches(*given, asked, below))
        if name == "entropy":
            alone = tile, half, [], [], [], both, below
            yield from ((title, x) for x in triton_launch.gradient_launches(*alone))
    x, y = torch.empty(rows, depth, dtype=torch.bfloat16), torch.empty(columns, depth, dtype=torch.bfloat16)
    for name in ("labels", "pairs"):
        given = lists[name], states(lists[name], rows)
        launched = triton_launch.linear_launches(x, y, tile, *given, hip=hip)
        yield from ((f"{name} with options", launch) for launch in launched)
    for name in ("entropy", "labels"):
        for stats in (lists.get(name, entropy), []):
            given = stats, states(stats, rows), None, across[name], states(across[name], columns)
            launched = triton_launch.linear_launches(x, y, tile, *given, hip=hip)
            yield from ((f"{name} of columns", launch) for launch in launched)
    sigmoid = [SumOf("softplus"), Score(ids)]
    groups = [SumOf("softplus"), Sum(where=Same(ids, classes))]
    for name, stats, below, asked in (
        ("sigmoid", sigmoid, [], both),
        ("sigmoid of groups", groups, [], both),
        ("entropy", entropy, [], both),
        ("entropy of columns", entropy, across["entropy"], sums(Sums(scale=scale))),
        ("labels", lists["labels"], [], both),
        ("labels of columns", lists["labels"], across["labels"], both),
        ("pairs", lists["pairs"], [], both),
        ("others of columns", entropy, across["others"], both),
    ):
        given = stats, states(stats, rows), coefficients(stats, rows), asked
        given += (Across(below, states(below, columns), coefficients(below, columns)) if below else None,)
        given += (states(stats, rows) if name.startswith("sigmoid") else None,)
        launched = triton_linear_gradient.launches(x, y, tile, half, *given, hip=hip)
        yield from ((f"{name} with options", launch) for launch in launched)


def threshold_rows_launches():
    """Sparsemax and entmax-1.5: p, and the loss with its gradient in place of the scores."""
    rows, columns = 4096, 32768
    scores, target, p = torch.empty(rows, columns), torch.zeros(rows).long(), torch.empty(rows, 32000).bfloat16()
    factor, losses = torch.empty(rows), torch.empty(rows, dtype=torch.float64)
    half = scores.view(torch.bfloat16)[:, :columns]
    for square, name in ((False, "sparsemax"), (True, "entmax15")):
        yield name, threshold_launches.rows(p, square, torch.empty_like(p), None, None, None)
        yield f"{name} loss", threshold_launches.rows(scores, square, half, target, factor, losses)
        yield name, threshold_launches.backward(p, p, torch.empty_like(p), square)


def spherical_launches():
    """Those of the factored layer's step, at the size of its paper's layer: a width that is no power of two, one target
    to a row and several, products of fp32 and of fp64."""
    m, d, n, lr = 256, 513, 4096, 0.1
    wide = torch.empty(d, d, dtype=torch.float64)
    for dtype, targets in ((torch.float32, 1), (torch.float32, 20), (torch.float64, 1)):
        f = Factors(torch.empty(n, d, dtype=dtype), wide, wide, wide, wide[0].clone(), wide[0].clone())
        alpha, row = torch.empty(m, targets, dtype=torch.float64), torch.empty(m, dtype=torch.float64)
        h, at, square = torch.empty(m, d, dtype=dtype), torch.zeros(m, targets).long(), torch.empty(d, d, dtype=dtype)
        visit, batch = Visit(row, alpha, row, row, h, at, h, h, h), Batch(alpha, row, row, h, at, h, h, h)
        weights, product = torch.empty(3, m, dtype=torch.float64), torch.empty(m, m, dtype=dtype)
        sums = torch.empty(device_launches.parts_of(m), 3, d, dtype=torch.float64)
        sizes, folded = torch.empty(2, device_launches.squares_of(d)).double(), torch.zeros(1, dtype=torch.int32)
        keys, rows = at.flatten(), torch.empty(m * targets, d, dtype=dtype)
        title = "factored" if targets == 1 else "factored, several targets"
        for loss in (SphericalZLoss(), TaylorSoftmaxLoss(), SphericalSoftmaxLoss(), SquaredErrorLoss()):
            yield title, device_launches.visit(f, visit, alpha, member("tests", loss))
        yield title, device_launches.backward(f, visit, row, h, h, batch)
        yield title, device_launches.prepare(f, batch, at, h, h, weights)
        yield title, device_launches.column_sums(h, weights, sums)
        yield title, device_launches.grams(f, product, product, row, weights, product, lr, 1.0)
        for changes in ((square,) * 3, (wide, wide, square)):
            yield title, device_launches.state(f, changes, sizes, lr, 1.0)
        yield title, device_launches.fold(f, sizes, 8.0)
        yield title, device_launches.settle(f, sums, sizes, folded, lr, 1.0, 8.0)
        for out in (rows, f.p):
            yield title, device_launches.segments(f, keys, keys, batch, h, folded, out, lr)


def pair_launches():
    """Those of ranking losses over pairs, and of soft positions."""
    scores = torch.zeros(16, 256)
    lists, mask = Lists(scores.shape, 1), torch.zeros(16, 256, dtype=torch.uint8)
    ends, whole = pairs_triton._ends(lists, scores), scores.int()
    for weight in ("one", "difference", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp"):
        items = pairs_torch.weighted(lists, scores, scores, weight, 10.0, 0)
        for counts in (None, mask):
            items = replace(items, counts=counts)
            yield weight, pairs_triton.loss_launch(items, ends, scores, scores, whole, "softplus", 1.0, 1.0)
    items = pairs_torch.Items(scores, scores)
    yield "logistic", pairs_triton.loss_launch(items, ends, scores, scores, whole, "logistic", 1.0, 1.0)
    for upstream in (None, scores):
        yield "positions", pairs_triton.position_launch(scores, mask, upstream, ends, scores, 1.0)


def permutation_launches():
    """Those of NeuralSort and SoftSort, of one column and of several at a time."""
    t, tau, along = torch.zeros(16, 1024), torch.ones(16).double(), torch.zeros(16, 1024).double()
    for relaxation, name, columns in (
        (0, "neural sort", 1),
        (0, "neural sort, several columns", 8),
        (1, "soft sort", 1),
        (2, "squared soft sort, several columns", 8),
    ):
        band, v = permutation_triton.Band.of(t, tau, None, None, relaxation), torch.zeros(16, 1024, columns)
        yield name, band.sides_launch()
        yield name, band.sums(v, v, t, v)
        yield name, band.sums(v, v, None, None)
        yield from ((name, launch) for launch in band.gradient(v, v, v, along, t, along))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        seen = set()
        for title, launch in launches(TARGETS[name].backend == "hip"):
            key = launch.kernel.__name__, repr(launch.constants), "options" in title and "vectors" in launch.arguments
            key += (launch.arguments.get("columns") == 1,)  # compiled for that
            if title.startswith("factored"):  # compiled for two types of P
                key += (str([signature_of(value, (0,), {}, {}) for value in launch.arguments.values()]),)
            if key not in seen:
                seen.add(key)
                found = takes(compiled(launch, TARGETS[name]))
                print(json.dumps(dict(target=name, kernel=launch.kernel.__name__, title=title, **found)), flush=True)
