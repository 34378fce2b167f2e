"""NeuralSort and SoftSort without their matrices, against the matrices."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from fusedloss.backends.native import _native
from fusedloss.sorting import NeuralSort, SoftSort, permutation_ops

F64 = torch.float64


def neural_sort(s: Tensor, tau) -> Tensor:
    """The official formula, with the matrix of distances: (…, n) to (…, n, n)."""
    n = s.shape[-1]
    distances = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs().sum(-1)
    scaling = (n + 1 - 2 * torch.arange(1, n + 1)).to(s)
    return ((scaling.unsqueeze(-1) * s.unsqueeze(-2) - distances.unsqueeze(-2)) / tau).softmax(-1)


def soft_sort(s: Tensor, tau, power: int = 1) -> Tensor:
    falling = s.sort(dim=-1, descending=True, stable=True).values
    return (-((falling.unsqueeze(-1) - s.unsqueeze(-2)).abs() ** power) / tau).softmax(-1)


class Kind:
    def __init__(self, make, dense, number):
        self.make, self.dense, self.number = make, dense, number


KINDS = {
    "neural_sort": Kind(NeuralSort, neural_sort, 0),
    "soft_sort": Kind(SoftSort, soft_sort, 1),
    "soft_sort_squared": Kind(lambda *a, **k: SoftSort(*a, power=2, **k), lambda s, t: soft_sort(s, t, 2), 2),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def leaf(x: Tensor, dtype=None) -> Tensor:
    return x.detach().to(dtype or x.dtype).clone().requires_grad_()


def results(make, s, tau, v, u, dtype):
    """P v, Pᵀ u, and the gradients of a function of both in s, tau, v, u."""
    s, tau, v, u = (leaf(x, dtype) for x in (s, tau, v, u))
    p = make(s, tau)
    y, x = p @ v, (p.mT if isinstance(p, Tensor) else p.T) @ u
    return y, x, *torch.autograd.grad((y * v.detach().cos()).sum() + (x * u.detach()).tanh().sum(), (s, tau, v, u))


def close(got, truth, tolerance, floor=0.0):
    """Each of `got`, relative to the truth's norm, or absolutely to `floor`."""
    for i, (a, b) in enumerate(zip(got, truth)):
        assert a.shape == b.shape
        error = (a.detach().double() - b.detach().double()).norm().item()
        assert error <= tolerance * max(b.norm().item(), floor), f"result {i}: {error} of {b.norm().item()}"


@pytest.mark.parametrize("dtype, tau", [(F64, 1e-3), (torch.float32, 0.1), (F64, 1.0), (torch.float32, 1e3)])
def test_products_and_gradients_are_those_of_the_matrix(backend, kind, dtype, tau):
    tolerance = 1e-11 if dtype == F64 else 2e-5
    for n, columns, ties in ((1, 1, False), (40, 1, True), (75, 5, False), (33, 2, True)):
        s = torch.randn(3, n, dtype=dtype) * 2
        if ties:
            s = s.round()
        v, u = torch.randn(2, 3, n, columns, dtype=dtype)
        tau_of = torch.tensor(tau, dtype=dtype)
        truth = results(kind.dense, s, tau_of, v, u, F64)
        # Gradients that a rounding of P hides: 1 / tau times what is summed.
        floors = [0, 0, 1 / tau, 1 / tau**2, 0, 0]
        for a, b, floor in zip(results(kind.make, s, tau_of, v, u, dtype), truth, floors):
            close([a], [b], tolerance * max(1, 0.1 / tau), floor)  # exponents are rounded in proportion to 1 / tau


def test_far_from_zero_and_large_values_lose_no_digits(backend, kind):
    """v and scores with a large offset: what is computed from the peak on does not see it."""
    s, v = torch.randint(-400, 400, (1, 200)) / 128, torch.arange(200.0) + 100_000
    truth = leaf(s, F64)
    truth_gradient = torch.autograd.grad(((kind.dense(truth, 0.5) @ v.double()) * truth.detach()).sum(), truth)[0]
    got = leaf(s + 4096)
    got_gradient = torch.autograd.grad(((kind.make(got, 0.5) @ v) * s).sum(), got)[0]
    tolerance = 2e-5 if backend == "cpu" else 2e-2  # the plain meaning takes P v as it comes
    close([got_gradient], [truth_gradient], tolerance)


@pytest.mark.parametrize("n", [1500])
def test_float32_is_better_than_the_dense_formula(kind, n):
    s, v, u = torch.randn(3, 1, n)
    tau = torch.tensor(1.0)
    truth = results(kind.dense, s, tau, v[..., None], u[..., None], F64)
    close(results(kind.make, s, tau, v[..., None], u[..., None], torch.float32), truth, 5e-6, floor=1.0)


def test_cross_entropy_top_k_mass_and_the_dense_matrix(backend, kind):
    s, tau = torch.randn(2, 3, 9, dtype=F64), torch.rand(2, 3, dtype=F64) + 0.3
    permutation = torch.rand(2, 3, 9).argsort(-1)
    truth = kind.dense(s, tau[..., None, None])
    p = kind.make(s, tau)
    close([p.dense(), p.top_k_mass(4)], [truth, truth[..., :4, :].sum(-2)], 1e-13)
    close([p.T @ torch.arange(9)], [truth.mT @ torch.arange(9, dtype=F64)], 1e-13)
    loss = lambda s, tau: kind.make(s, tau).cross_entropy(permutation)
    dense = lambda s, tau: -kind.dense(s, tau[..., None, None]).log().gather(-1, permutation[..., None]).mean((-1, -2))
    a, b = (leaf(s), leaf(tau)), (leaf(s), leaf(tau))
    close([loss(*a)], [dense(*b)], 1e-13)
    weight = torch.rand(2, 3, dtype=F64)
    grad = torch.autograd.grad
    close(grad((loss(*a) * weight).sum(), a), grad((dense(*b) * weight).sum(), b), 1e-11)


def test_cross_entropy_of_a_sure_permutation_keeps_its_digits(backend):
    """log(1 + rest), not log of a rounded sum: at 1 + 1e-12 fp32 has no digit left."""
    s = torch.tensor([3.0, 2.0, 1.0])
    p = SoftSort(s, 1 / 28)
    truth = -soft_sort(s.double(), 1 / 28).log().diagonal().mean()
    close([p.cross_entropy(torch.arange(3))], [truth], 1e-5)
    assert torch.isinf(SoftSort(s, 1.0, mask=torch.tensor([True, True, False])).cross_entropy(torch.tensor([2, 0, 1])))


def test_hard_is_the_hard_sort_with_the_soft_gradient(backend, kind):
    s = leaf(torch.randn(2, 12, dtype=F64))
    v, u = torch.randn(2, 2, 12, dtype=F64)
    p = kind.make(s, 0.7, hard=True)
    order = s.argsort(-1, descending=True)
    assert torch.equal(p @ v, v.gather(-1, order)) and torch.equal((p.T @ u).gather(-1, order), u)
    assert torch.equal(p.dense().argmax(-1), order) and torch.equal(p.dense().detach().sum(-1), torch.ones_like(s))
    soft, gradient = kind.make(s, 0.7), lambda p: torch.autograd.grad((p @ v * u).sum() + (p.T @ v * u).sum(), s)
    close(gradient(p), gradient(soft), 1e-12)
    w = leaf(v)
    assert torch.equal(torch.autograd.grad((p @ w * u).sum(), w)[0].gather(-1, order), u)


def test_lists_by_mask_and_by_offsets_are_lists_of_their_own(backend, kind):
    lengths = [4, 0, 1, 9, 17, 2]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    s, v, u = leaf(torch.randn(33, dtype=F64)), leaf(torch.randn(33, 2, dtype=F64)), leaf(torch.randn(33, 2, dtype=F64))
    tau = leaf(torch.rand(6, dtype=F64) + 0.2)
    permutation = torch.cat([torch.randperm(n) for n in lengths])
    p = kind.make(s, tau, offsets=offsets)
    got = [p @ v, p.T @ u, p.top_k_mass(2), p.cross_entropy(permutation)]
    mask = torch.arange(17).expand(6, 17).flip(1) < torch.tensor(lengths)[:, None]  # items at the rows' ends
    pad = lambda x, fill: x.new_full((6, 17, *x.shape[1:]), fill).index_put((mask,), x)
    places = mask.flip(1)
    q = kind.make(pad(s, torch.nan), tau, mask=mask)
    place_permutation = torch.zeros(6, 17, dtype=torch.int64)
    first = torch.tensor(lengths)[:, None]
    place_permutation[places] = permutation + (17 - first).expand(6, 17)[places]
    by_place = v.new_full((6, 17, 2), torch.nan).index_put((places,), u)
    masked = [q @ pad(v, torch.nan), q.T @ by_place, q.top_k_mass(2), q.cross_entropy(place_permutation)]
    assert (masked[0][~places] == 0).all() and (masked[1][~mask] == 0).all()
    masked = [masked[0][places], masked[1][mask], masked[2][mask], masked[3]]
    single = [[], [], [], []]
    for r, n in enumerate(lengths):
        part = slice(offsets[r], offsets[r + 1])
        one = kind.make(s[part], tau[r])
        found = one @ v[part], one.T @ u[part], one.top_k_mass(2), one.cross_entropy(permutation[part])
        for kept, x in zip(single, found):
            kept.append(x.reshape(-1, *x.shape[1:]) if x.dim() else x.reshape(1))
    single = [torch.cat(x) for x in single]
    gradient = lambda r: torch.autograd.grad(sum((x * x.detach().cos()).sum() for x in r), (s, tau, v, u))
    truth = gradient(single)
    for case in (got, masked):
        close(case, single, 1e-12)
        close(gradient(case), truth, 1e-11)


def test_any_dimension_stride_and_shape_of_the_operand(backend, kind):
    s, v = torch.randn(5, 2, 8, dtype=F64)[:, :, ::2].movedim(1, 0), torch.randn(4, 5, 2, dtype=F64).permute(2, 1, 0)
    along = kind.make(s.movedim(2, 1), 0.5, dim=1)
    truth = kind.dense(s, 0.5)
    close([along @ v.movedim(2, 1)], [(truth @ v[..., None])[..., 0].movedim(2, 1)], 1e-13)
    many = torch.randn(2, 4, 5, 3, dtype=F64)
    close([along.T @ many], [(truth.mT @ many.movedim(1, 2)).movedim(2, 1)], 1e-13)
    close([along @ torch.arange(4.0)], [(truth @ torch.arange(4, dtype=F64)).movedim(2, 1)], 1e-13)
    line = torch.randn(6, dtype=F64)
    close([kind.make(line) @ line], [kind.dense(line, 1.0) @ line], 1e-13)
    for empty in (torch.randn(0, 3), torch.randn(3, 0), torch.randn(0)):
        p = kind.make(leaf(empty))
        assert (p @ empty).shape == empty.shape and (p.T @ empty).shape == empty.shape
        assert p.cross_entropy(empty.long()).shape == empty.shape[:-1]
        (p @ empty).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(backend, kind, dtype):
    n = 3000 if backend == "cpu" else 100  # many ties; ranks beyond 2048
    s = leaf(torch.randn(2, n).to(dtype))
    ranks = kind.make(s, 0.1).T @ torch.arange(n)
    wide = leaf(s, torch.float32)
    expected = kind.make(wide, 0.1).T @ torch.arange(float(n))
    assert ranks.dtype == torch.float32 and torch.equal(ranks, expected)
    gradient = torch.autograd.grad(ranks.square().mean(), s)[0]
    assert gradient.dtype == dtype
    assert torch.equal(gradient, torch.autograd.grad(expected.square().mean(), wide)[0].to(dtype))


def test_scores_that_are_not_finite_spoil_their_own_list_only(backend, kind):
    s = torch.randn(4, 6)
    s[0, 2], s[1, 3], s[2, 4] = torch.inf, torch.nan, -torch.inf
    s = leaf(s)
    y = kind.make(s, 1.0) @ s.detach().nan_to_num(0, 0, 0)
    assert y[:3].isnan().all() and y[3].isfinite().all()
    gradient = torch.autograd.grad(y.sum(), s)[0]
    assert gradient[:3].isnan().all() and gradient[3].isfinite().all()
    assert kind.make(s, 1.0).cross_entropy(torch.arange(6).expand(4, 6)).isfinite().tolist() == [False] * 3 + [True]


def test_plateaus_and_extremes(backend, kind):
    """Equal scores share their mass evenly however many they are; scores far apart are hard sorted without overflow."""
    n = 3000 if backend == "cpu" else 100
    p = kind.make(torch.zeros(1, n), 1e-3)
    close([p @ torch.arange(float(n))], [torch.full((1, n), (n - 1) / 2, dtype=F64)], 1e-6)
    s = torch.tensor([[-1e30, 1e30, 0.0, 1e-30]])
    hard = kind.make(s, 1e-3) @ torch.arange(4.0)
    assert torch.equal(hard, torch.tensor([[1.0, 2.5, 2.5, 0.0]]))


def test_derivatives_of_any_order(backend, kind):
    s, tau = leaf(torch.randn(2, 4, dtype=F64)), leaf(torch.rand(2, dtype=F64) + 0.4)
    v = leaf(torch.randn(2, 4, dtype=F64))
    mask = torch.tensor([[True] * 4, [True, False, True, True]])
    permutation = torch.tensor([[3, 1, 0, 2], [0, 2, 3, 0]])

    def all_of_it(s, tau, v):
        p = kind.make(s, tau, mask=mask)
        return torch.stack([p @ v, p.T @ v]).sin().sum(0), p.cross_entropy(permutation)

    assert torch.autograd.gradcheck(all_of_it, (s, tau, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(all_of_it, (s, tau, v), fast_mode=True)
    once = lambda s, v: torch.autograd.grad((kind.make(s, 0.7) @ v).pow(2).sum(), s, create_graph=True)[0]
    assert torch.autograd.gradgradcheck(once, (leaf(s[:1, :3]), leaf(v[:1, :3])), fast_mode=True)


def test_offsets_have_second_derivatives(backend, kind):
    s, v = leaf(torch.randn(6, dtype=F64)), leaf(torch.randn(6, 2, dtype=F64))
    offsets = torch.tensor([0, 2, 2, 6])
    assert torch.autograd.gradgradcheck(lambda s, v: kind.make(s, 0.6, offsets=offsets) @ v, (s, v), fast_mode=True)


@pytest.mark.unpoisoned
def test_operators(backend):
    """In full of the compiled engine; what the other one may do wrong is its outputs' layout and its inputs."""
    t = leaf(torch.randn(2, 6, dtype=F64).sort(1, descending=True).values)
    tau, v = leaf(torch.ones(2, dtype=F64)), leaf(torch.randn(2, 6, 2, dtype=F64))
    layout = torch.tensor([6, 3]), None, 0
    how = {} if backend == "cpu" else dict(test_utils=("test_schema", "test_faketensor"))
    check = partial(torch.library.opcheck, **how)
    check(torch.ops.fusedloss.permutation_order, (t.detach(), torch.rand(2, 6) > 0.5, None))
    check(torch.ops.fusedloss.permutation_product, (t, tau, v, *layout))
    check(torch.ops.fusedloss.permutation_transposed, (t, tau, v, *layout))
    _, rest, deviation = (x.detach() for x in permutation_ops.product(t, tau, v, *layout))
    check(torch.ops.fusedloss.permutation_gradient, (t, tau, rest, v, leaf(v), deviation, *layout))
    check(torch.ops.fusedloss.permutation_gradient, (t, tau, rest, v[..., :1], None, None, *layout))


@pytest.mark.unpoisoned
def test_compiles_whole():
    offsets, permutation = torch.tensor([0, 3, 10]), torch.cat([torch.randperm(3), torch.randperm(7)])

    def loss(s, v):
        p = NeuralSort(s, 0.5, offsets=offsets)
        q = SoftSort(s.view(2, 5), 0.5, hard=True)
        rest = (p.T @ v).sum() + p.cross_entropy(permutation).sum() + (q.T @ v.view(2, 5)).sum()
        return (p @ v).square().sum() + rest

    s, v = leaf(torch.randn(10, dtype=F64)), leaf(torch.randn(10, dtype=F64))
    got, truth = torch.compile(loss, fullgraph=True, backend="aot_eager")(s, v), loss(s, v)
    close([got, *torch.autograd.grad(got, (s, v))], [truth, *torch.autograd.grad(truth, (s, v))], 1e-12)
    with pytest.raises(TypeError):
        v @ NeuralSort(s)


def test_vmap(backend, kind):
    s, v = leaf(torch.randn(5, 2, 7, dtype=F64)), torch.randn(2, 7, dtype=F64)
    got = torch.func.vmap(lambda s: kind.make(s, 0.5) @ v)(s)
    truth = kind.make(s, 0.5) @ v.expand(5, 2, 7)
    close([got, *torch.autograd.grad(got.tanh().sum(), s)], [truth, *torch.autograd.grad(truth.tanh().sum(), s)], 1e-13)


@pytest.mark.skipif(_native is None, reason="the compiled extension did not load")
def test_same_bits_for_any_number_of_threads(kind, device):
    if device.type != "cpu":
        pytest.skip("threads of the CPU engine")
    before = torch.get_num_threads()
    found = []
    for shape in ((1, 3000), (3, 700)):
        torch.manual_seed(0)
        s, v, u = torch.randn(3, *shape)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(kind.make, s, torch.tensor(1.0), v[..., None], u[..., None], torch.float32))
    torch.set_num_threads(before)
    for a, b in zip(found[::2], found[1::2]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


MEMORY = """
import resource, torch
from fusedloss.sorting import NeuralSort, SoftSort
torch.set_num_threads(1)
def step(n, tau):
    s = torch.randn(n, requires_grad=True)
    for p in (NeuralSort(s, tau), SoftSort(s, tau), SoftSort(s, tau, 2)):
        ((p @ s.detach()).square().sum() + (p.T @ s.detach()).sum()).backward()
step(100, 0.01)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(20_000, 0.01)
step(4_000, 1e6)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.host
@pytest.mark.skipif(_native is None, reason="the compiled extension did not load")
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_is_linear_also_where_all_of_the_matrix_counts():
    """Of n = 20 000 one matrix of fp32 is 1526 MiB; of n = 4000, where tau lets all entries count, 61."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24 * 1024


def test_the_plain_meaning_takes_rows_in_chunks(monkeypatch, kind):
    from fusedloss.sorting import permutation_torch as plain

    t = torch.randn(2, 50, dtype=F64).sort(1, descending=True).values
    v, u = torch.randn(2, 2, 50, 3, dtype=F64)
    tau, counts = torch.ones(2, dtype=F64), torch.tensor([50, 20])
    by = [torch.randn_like(x) for x in (t, tau, v)]
    run = lambda: [
        *plain.product(kind.number, t, tau, v, counts),
        *plain.transposed(kind.number, t, tau, u, counts),
        *plain.gradient(kind.number, t, tau, u, v, counts),
        *plain.gradient(kind.number, t, tau, u[..., :1], None, counts)[:2],
        *plain.second_gradient(kind.number, t, tau, u, v, counts, by),
    ]
    whole = run()
    monkeypatch.setattr(plain, "CHUNK", 2 * 50 * 7)
    close(run(), whole, 1e-11, floor=1.0)


def test_errors(kind):
    s = torch.randn(2, 4)
    for wrong, message in (
        (lambda: kind.make(s, 0.0), "tau: expected"),
        (lambda: kind.make(s, torch.ones(3)), "tau: expected"),
        (lambda: kind.make(s.long()), "scores: expected"),
        (lambda: kind.make(s) @ torch.randn(2, 5), "operand: expected"),
        (lambda: kind.make(s) @ 3, "operand: expected"),
        (lambda: kind.make(s).cross_entropy(torch.zeros(2, 4)), "permutation: expected"),
        (lambda: kind.make(s).cross_entropy(torch.full((2, 4), 4)), "permutation: expected"),
        (lambda: kind.make(s).top_k_mass(-1), "k: expected"),
        (lambda: kind.make(s[0], offsets=torch.tensor([0, 4])).dense(), "dense: expected"),
        (lambda: SoftSort(s, power=3), "power: expected"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrong()


def test_forward_mode_is_refused_and_not_dropped():
    x = torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match="NeuralSort: scores: expected reverse-mode derivatives"):
        torch.func.jvp(lambda x: NeuralSort(x) @ torch.ones(2, 3), (x,), (x,))
    with pytest.raises(NotImplementedError, match="SoftSort: operand: expected reverse-mode derivatives"):
        torch.func.jvp(lambda v: SoftSort(x).T @ v, (x,), (x,))


@pytest.mark.unpoisoned
def test_a_tau_that_changes_compiles_once_more_only():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(lambda x, tau: NeuralSort(x, tau) @ x, backend=counter, fullgraph=True)
    x = torch.randn(2, 4)
    for tau in (0.5, 0.7, 0.9, 1.1):
        torch.testing.assert_close(run(x, tau), NeuralSort(x, tau) @ x)
    assert counter.frame_count <= 2


def test_export_with_other_sizes():
    class Product(torch.nn.Module):
        def forward(self, x):
            return NeuralSort(x, 0.5) @ x

    some = torch.export.Dim.DYNAMIC
    program = torch.export.export(Product(), (torch.randn(3, 4),), dynamic_shapes=({0: some, 1: some},))
    x = torch.randn(5, 6)
    torch.testing.assert_close(program.module()(x), Product()(x))


def test_vmap_of_the_cross_entropy():
    x = torch.randn(5, 3, 6)
    loss = lambda x, permutation: NeuralSort(x, 0.5).cross_entropy(permutation)
    wanted = torch.stack([loss(a, a.argsort(-1)) for a in x])
    torch.testing.assert_close(torch.vmap(loss)(x, x.argsort(-1)), wanted)
