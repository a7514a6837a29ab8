"""The adaptive solver: exact flows to a tolerance, each example alone, at the price that scipy pays for one."""

import math

import pytest
import torch
from torch import Tensor

from helpers import gaussian_data, refuses, within
from quieten.denoiser import Preconditioned, ve, vp
from quieten.gaussian import Gaussian
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP
from quieten.sampling import generate, sample, trajectory
from quieten.schedule import Rectified, Table, karras
from quieten.solver import RungeKutta
from quieten.solvers.adaptive import DORMAND_PRINCE, RK45, Effort, angle
from quieten.solvers.samplers import sampler
from quieten.wrap import Counted

pytestmark = pytest.mark.usefixtures("one_thread")
INF = math.inf


def mixture(process=VE, kind=MixtureData) -> MixtureData:
    means = torch.tensor([[1.0, 0.5], [-0.8, 1.0], [-0.5, -1.2], [1.1, -0.7]], dtype=torch.float64)
    sd = torch.tensor([0.3, 0.5, 0.4, 0.6], dtype=torch.float64)
    return kind(means, sd.square(), torch.tensor([0.3, 0.2, 0.3, 0.2]), process)


def levels(*sigmas: float) -> Tensor:
    return -2.0 * torch.tensor(sigmas, dtype=torch.float64).log()


def effort(denoiser, x: Tensor, grid: Tensor, transition: RK45) -> tuple[Tensor, Effort]:
    with torch.no_grad():
        *_, state = trajectory(denoiser, x, grid, transition)
    return state.x, state.step.memory


def test_the_table_is_of_order_five() -> None:
    """All conditions up to order 5 on quadratures, and the error of fixed steps on a nonlinear flow."""
    c, b = torch.tensor(DORMAND_PRINCE.nodes, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    b[:6] = torch.tensor(DORMAND_PRINCE.matrix[-1], dtype=torch.float64)
    low = b - torch.tensor(DORMAND_PRINCE.error, dtype=torch.float64)
    for k in range(5):
        within(1e-15, abs(float((b * c**k).sum()) - 1 / (k + 1)), f"integral of c^{k}, order 5")
        if k < 4:
            within(1e-15, abs(float((low * c**k).sum()) - 1 / (k + 1)), f"integral of c^{k}, order 4")
    for node, row in zip(DORMAND_PRINCE.nodes[1:], DORMAND_PRINCE.matrix, strict=True):
        assert abs(sum(row) - node) < 1e-14
    five = RungeKutta(DORMAND_PRINCE.nodes[:6], DORMAND_PRINCE.matrix[:-1], DORMAND_PRINCE.matrix[-1])
    x = 3.0 * torch.randn(32, 2, dtype=torch.float64)
    grid = levels(3.0, 0.2)
    truth = sample(mixture(), x, grid, RK45(1e-12, 1e-12))

    def error(steps: int) -> float:
        fine = torch.linspace(float(grid[0]), float(grid[1]), steps + 1, dtype=torch.float64)
        return float((sample(mixture(), x, fine, five) - truth).square().mean().sqrt())

    within(0.25, abs(math.log2(error(32) / error(64)) - 5), "order of fixed steps, off 5 by")


@pytest.mark.parametrize("process", [VE, VP, FLOW], ids=str)
@pytest.mark.parametrize("kind", ["vector", "image, full covariance"])
def test_gaussian_flow_to_the_tolerance(process, kind) -> None:
    data = gaussian_data(kind, process)
    grid = levels(80.0, 0.002)
    x = data.marginal(float(grid[0]), torch.zeros(4, *data.shape).double()).sample(torch.randn(4, *data.shape).double())
    truth = data.flow(x, float(grid[0]), float(grid[1]))
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        out, spent = effort(data, x, grid, RK45(tolerance, tolerance))
        errors.append(float((out - truth).abs().max()))
        within(30 * tolerance, errors[-1], f"global error at {tolerance:g}, {spent.evaluations.tolist()} evaluations")
    assert errors[0] > 1e3 * errors[-1]


@pytest.mark.parametrize("process", [VE, VP, FLOW], ids=str)
def test_backwards_and_forwards_again(process) -> None:
    data, grid = mixture(process), levels(20.0, 0.05)
    x = 20.0 * torch.randn(8, 2, dtype=torch.float64) * process.scales(float(grid[0]))[0]
    clean = sample(data, x, grid, RK45(1e-9, 1e-9))
    # on the way up errors grow with sigma
    within(1e-5, ((sample(data, clean, grid.flip(0), RK45(1e-9, 1e-9)) - x) / 20.0).abs().max(), "there and back")


def test_the_process_is_only_a_scaling() -> None:
    z, grid = 20.0 * torch.randn(8, 2, dtype=torch.float64), levels(20.0, 0.05)
    ends = []
    for process in (VE, VP, FLOW):
        (first, _), (last, _) = process.scales(float(grid[0])), process.scales(float(grid[1]))
        ends.append(sample(mixture(process), z * first, grid, RK45()) / last)
    within(1e-9, max((end - ends[0]).abs().max() for end in ends), "VP and FLOW against VE")


@pytest.mark.parametrize("process", [VP, FLOW], ids=str)
def test_from_pure_noise(process) -> None:
    """At lam = -inf the slope is -x0: the limit of large -lam, also for a network that predicts v."""
    x, tail = torch.randn(16, 2, dtype=torch.float64), levels(0.05)
    a, b = (sample(mixture(process), x, torch.cat([torch.tensor([lam]).double(), tail]), RK45()) for lam in (-INF, -60.0))
    within(1e-9, (a - b).abs().max(), "from -inf and from -60")

    class Net(torch.nn.Module):
        def forward(self, x, t):
            return torch.tanh(x) + t[:, None]

    model = Preconditioned(Net(), process, "v", embed=lambda lam: torch.sigmoid(-lam))
    transition, grid = sampler("rk45", Rectified().grid(4))
    assert grid[0] == -INF
    assert sample(model, x, grid, transition).isfinite().all()


def test_each_example_is_alone() -> None:
    """The same result and the same effort whatever shares its batch, and batches of 0 and 1."""
    x = 80.0 * torch.randn(24, 2, dtype=torch.float64)
    x[::3] *= 20.0  # starts that no data lead to: they take another number of steps
    grid = torch.cat([levels(80.0, 0.002), torch.tensor([INF])])
    whole, spent = effort(mixture(), x, grid, RK45())
    assert len(set(spent.accepted.tolist())) > 1
    assert torch.equal(spent.evaluations, 2 + 6 * (spent.accepted + spent.rejected) + 1)
    for rows in (slice(0, 0), slice(3, 4), slice(5, 24)):
        part, alone = effort(mixture(), x[rows], grid, RK45())
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-12)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, spent, strict=True))


def test_float32_is_close_and_inputs_are_left_alone() -> None:
    x = 80.0 * torch.randn(8, 2, dtype=torch.float64)
    kept = x.clone()
    _, grid = sampler("rk45", karras(5))
    wide = sample(mixture(), x, grid, RK45())
    narrow = sample(mixture(), x.float(), grid, RK45())
    assert torch.equal(x, kept)
    assert narrow.dtype == torch.float32
    within(1e-4, (narrow.double() - wide).abs().max(), "float32 against float64")


def test_the_price_of_a_good_coordinate() -> None:
    """One example at a time, scipy's RK45 in x and sigma takes over twice as many evaluations for the same error."""
    integrate = pytest.importorskip("scipy.integrate", exc_type=ImportError)
    data, grid = mixture(), levels(80.0, 0.002)
    x = 80.0 * torch.randn(8, 2, dtype=torch.float64)
    ours, spent = effort(data, x, grid, RK45())
    truth = sample(data, x, grid, RK45(1e-11, 1e-11))

    def slope(s, z):
        state = torch.from_numpy(z)[None]
        return ((state - data(state, -2 * math.log(s)).mean) / s)[0].numpy()

    evaluations, theirs = 0, []
    for row in x:
        solved = integrate.solve_ivp(slope, (80.0, 0.002), row.numpy(), rtol=1e-5, atol=1e-5)
        evaluations, theirs = evaluations + solved.nfev, [*theirs, torch.from_numpy(solved.y[:, -1])]
    within(0.4 * evaluations, int(spent.evaluations.sum()), f"evaluations, scipy takes {evaluations}")
    scipys = float((torch.stack(theirs) - truth).abs().max())
    within(max(1.5 * scipys, 1e-4), (ours - truth).abs().max(), f"error, scipy's is {scipys:.1e}")


def test_networks_are_asked_for_their_own_form() -> None:
    """Trained forms, scalings and times: the same flow through networks that answer what the oracle would."""

    class Oracle(torch.nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def forward(self, x, t):
            return self.answer(x, t)

    data = GaussianData(torch.tensor([0.3, -0.4], dtype=torch.float64), 0.2)
    grid = levels(50.0, 0.01)
    x = 50.0 * torch.randn(5, 2, dtype=torch.float64)
    truth = data.flow(x, *grid.tolist())

    def ve_net(x, t):  # D = x + sigma F, t = ln(sigma / 2)
        sigma = 2 * t.exp()
        return (data(x, -2 * sigma.log()).mean - x) / sigma[:, None]

    within(1e-4, (sample(ve(Oracle(ve_net)), x, grid, RK45()) - truth).abs().max(), "VE network")

    def vp_net(x_in, t):  # x_in = x / sqrt(1 + sigma^2), t = 999 * time
        time = t / 999
        sigma = torch.expm1(0.5 * 19.9 * time**2 + 0.1 * time).sqrt()[:, None]
        x = x_in * (1 + sigma**2).sqrt()
        return (x - data(x, -2 * sigma[:, 0].log()).mean) / sigma

    within(1e-4, (sample(vp(Oracle(vp_net), VE), x, grid, RK45()) - truth).abs().max(), "VP network")


def test_sampler_generate_and_chunks() -> None:
    """By name: the ends of any grid, conditions that are bound, the same samples in any chunks."""
    transition, grid = sampler("rk45", karras(18), rtol=1e-4, atol=1e-4)
    assert grid.tolist() == [karras(18)[0].item(), karras(18)[17].item(), INF]

    class Shifted(MixtureData):
        def forward(self, x, lam, *, label, **cond):
            alpha, _ = self.process.scales_over(lam, x)
            shift = 3.0 * label[:, None].to(x)
            p = super().forward(x - alpha * shift, lam)
            return Gaussian(p.mean + shift, p.var.expand_as(p.mean))

    model, label = mixture(kind=Shifted), {"label": torch.arange(12) % 3}
    runs = [generate(model, 12, grid=grid, transition=transition, batch=n, cond=label) for n in (12, 5)]
    torch.testing.assert_close(*runs, rtol=0, atol=2e-3)  # in float32, where rounding may add or spare a step
    assert (runs[0][2::3].mean() - runs[0][::3].mean()) > 3


def test_denoise() -> None:
    x, (_, grid) = 80.0 * torch.randn(6, 2, dtype=torch.float64), sampler("rk45", karras(5))
    noisy, clean = (sample(mixture(), x, grid, RK45(denoise=d)) for d in (False, True))
    assert torch.equal(noisy, sample(mixture(), x, grid[:2], RK45()))
    assert torch.equal(clean, mixture()(noisy, float(grid[1])).mean)
    counted = Counted(mixture())
    _, spent = effort(counted, x, grid, RK45())
    assert counted.calls == spent.evaluations.max()
    assert counted.rows == counted.calls * len(x)


def test_gradients_flow_through_the_states() -> None:
    x, v, w = torch.randn(3, 4, 2, dtype=torch.float64)
    grid, solver = levels(2.0, 0.1), RK45(1e-9, 1e-9)

    def run(x: Tensor) -> Tensor:
        for state in trajectory(mixture(), x, grid, solver):
            end = state.x
        return end

    (gradient,) = torch.autograd.grad((run(x.requires_grad_()) * w).sum(), x)
    with torch.no_grad():
        difference = (run(x + 1e-4 * v) - run(x - 1e-4 * v)).mul(w).sum() / 2e-4
    torch.testing.assert_close((gradient * v).sum(), difference, rtol=1e-5, atol=1e-7)


def test_a_table_of_levels_snaps() -> None:
    """Networks of discrete chains: the ends are whole indices."""
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    seen: list[Tensor] = []

    class Net(torch.nn.Module):
        def forward(self, x, t):
            seen.append(t)
            return 0.1 * x

    _, grid = sampler("rk45", table.grid(10, "linspace"))
    sample(Preconditioned(Net(), VP, "eps", table), torch.randn(2, 3, dtype=torch.float64), grid, RK45(1e-3, 1e-3))
    assert seen[0].tolist() == [999.0, 999.0]
    assert seen[-1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("lam", [-80.0, -3.0, 0.0, 0.1, 40.0])
def test_angles(lam: float) -> None:
    alpha, sigma = VP.scales(lam)
    assert math.isclose(math.sin(angle(lam)), sigma, rel_tol=1e-14)
    assert math.isclose(math.cos(angle(lam)), alpha, rel_tol=1e-12, abs_tol=1e-16)
    assert (angle(INF), angle(-INF)) == (0.0, 0.5 * math.pi)


@pytest.mark.parametrize(
    "call, pieces",
    [
        (lambda x: RK45(rtol=-1e-5), ("`rtol`", "-1e-05", "1e-5 is usual")),
        (lambda x: RK45(0.0, 0.0), ("`rtol`", "nor both 0")),
        (lambda x: RK45(max_steps=0), ("`max_steps`", "0")),
        (lambda x: sample(mixture(), x, levels(80.0, 0.002), RK45(max_steps=3)), ("`rtol`=1e-05", "3 steps", "float64")),
        (lambda x: sample(mixture(), x, torch.tensor([INF, 0.0]), RK45()), ("`lam_t`", "+inf", "finite level")),
        (lambda x: sampler("rk45", karras(1)), ("`steps`", "at least 2", "rk45")),
    ],
)
def test_bad_input(call, pieces) -> None:
    with refuses(*pieces):
        call(80.0 * torch.randn(2, 2, dtype=torch.float64))


def test_a_denoiser_that_breaks_is_reported() -> None:
    class Broken(MixtureData):
        def forward(self, x, lam, **cond):
            p = super().forward(x, lam)
            return Gaussian(p.mean * math.nan, p.var)

    counted = Counted(mixture(kind=Broken))
    with refuses("`rtol`", "not met"):
        sample(counted, torch.randn(2, 2).double(), levels(9.0, 0.1), RK45())
    assert counted.calls < 200, "soon"


def test_equal_levels_do_nothing() -> None:
    x = torch.randn(2, 2, dtype=torch.float64)
    assert RK45()(mixture(), x, 1.0, 1.0).p.mean is x
