"""What an iteration of DxMI keeps, copies and differentiates, against the formulation of the released code at equal results.

    python benchmarks/dxmi.py [--check] [--rounds 7] [--threads 1]

The released formulation, written down here from its description: a buffer of five copies of the trajectory (state, next state,
final state repeated T times, mean, control) that grows by concatenation; a value sweep that permutes the whole buffer for every
step; a target that is computed with a graph and then detached; and a policy step through a value whose weights want gradients.
Both train the same networks from the same noise, and must end with the same weights.

With one thread, the default, times are the processor's, which other load hardly disturbs; the least of interleaved rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from common import header, interleaved
from quieten import VP, Draws, Preconditioned
from quieten.imitation import MaxEntIRL
from quieten.nets import UNet
from quieten.noise import INITIAL
from quieten.tuning.critics import frozen, mean
from quieten.tuning.energies import ResidualValue
from quieten.tuning.pairs import keyed, shuffled
from quieten.tuning.policy import Policy, Rollout
from quieten.tuning.policy_schedule import edm_grid
from quieten.tuning.running_cost import Auxiliary
from quieten.tuning.settings import Settings

BARS = {
    "trajectory, in (T + 1) B D floats": ("at most", 1.1),
    "trajectory memory": ("at least", 4.0),
    "bookkeeping time": ("at least", 20.0),
    "activations of a value step": ("at least", 1.8),
    "value pass of the policy step": ("at least", 1.3),
    "difference of the trained weights": ("at most", 1e-6),
}
SETTINGS = Settings(
    lr_policy=0.01, lr_std=0.01, lr_value=0.01, optimizer="sgd", value_optimizer="sgd", entropy_in_value=0, velocity_in_value=0
)


# ---- the released formulation


class Buffer:
    """Everything of every step, for every row: grown by concatenation, as a replay buffer is."""

    names = ("state", "next_state", "final", "mean", "control", "k")

    def __init__(self) -> None:
        self.fields: dict[str, Tensor] = {}

    def append(self, **rows: Tensor) -> None:
        for name, new in rows.items():
            self.fields[name] = torch.cat([self.fields[name], new]) if name in self.fields else new

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.fields.values())


def fill(states: list[Tensor], means: list[Tensor]) -> Buffer:
    buffer = Buffer()
    for k, m in enumerate(means):
        x = states[k]
        buffer.append(
            state=x.clone(), next_state=states[k + 1].clone(), final=states[-1].clone(), mean=m.clone(), control=m - x,
            k=torch.full((len(x),), k),
        )  # fmt: skip
    return buffer


def velocities(states: list[Tensor]) -> Tensor:
    stacked = torch.stack(states)
    return (stacked[1:] - stacked[:-1]).square().flatten(1).mean(1)


def rows_of(buffer: Buffer, k: int, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of one step, out of the whole buffer in another order."""
    state, next_state, final = (buffer.fields[name][order] for name in ("state", "next_state", "final"))
    here = buffer.fields["k"][order] == k
    return state[here], next_state[here], final[here]


class Released:
    """The iteration as it was released, of the same policy, value and randomness."""

    def __init__(self, irl: MaxEntIRL):
        self.policy, self.value, self.s, self.costs = irl.policy, irl.value, irl.settings, irl.time_costs
        self.s2 = irl.auxiliary.s2.clone()
        self.optimizers = irl.optimizers

    def iterate(self, x0: Tensor, draws: Draws) -> None:
        s, T = self.s, self.policy.T
        with torch.no_grad():
            noise = keyed(draws, "rollout 0")
            states, means = [self.policy.prior(noise(INITIAL, x0))], []
            self.policy.eval()
            for k in range(T):
                p = self.policy.step(states[-1], k)
                means.append(p.mean)
                states.append(p.sample(noise(k, x0)))
        buffer = fill(states, means)
        self.s2 = 0.99 * self.s2 + 0.01 * velocities(states)
        e = self.value(torch.cat([x0, states[-1]]), T)
        data, drawn = e.chunk(2)
        self.step("value", data.mean() - drawn.mean() + s.gamma * (data.square().mean() + drawn.square().mean()))
        for k in reversed(range(T)):
            x, x_next, _ = rows_of(buffer, k, torch.randperm(T * len(x0)))
            self.step("value", self.value_loss(x, x_next, k))
        rows = shuffled(draws, T, "pairs")[: len(x0)]
        x, k = buffer.fields["state"][rows], buffer.fields["k"][rows]
        self.policy.train()
        p = self.policy.step(x, k)
        x_next = p.sample(draws.normal(x, "policy 0")[rows % len(x0)])
        cost = (x_next - x).square().flatten(1).mean(1) / (2 * self.s2[k])
        logs = self.policy.log_rho(k, p)
        self.step("policy", (self.value(x_next, k + 1) + s.tau2 * cost - s.tau1 * logs).mean(), s.policy_clip)

    def value_loss(self, x: Tensor, x_next: Tensor, k: int) -> Tensor:
        target = self.value(x_next, k + 1) + self.costs[k]
        cost = (x_next - x).square().flatten(1).mean(1) / (2 * self.s2[k])
        target = target + self.s.tau2 * cost - self.s.tau1 * self.policy.transition.log_rhos[k]
        return (self.value(x, k) - target.detach()).square().mean()

    def step(self, name: str, loss: Tensor, clip: float | None = None) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()


# ---- what is compared


def made(size: int, T: int, width: int) -> MaxEntIRL:
    torch.manual_seed(0)
    net = UNet(3, size, width=16, detail=8)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    denoiser = Preconditioned(net, VP, shape=(3, size, size))
    policy = Policy(denoiser, edm_grid(T, 0.02, 20.0))
    return MaxEntIRL(policy, ResidualValue((3, size, size), width=width), settings=SETTINGS)


def difference(iterations: int = 3) -> tuple[float, float]:
    """The largest difference of weights and velocities after some iterations of both, and by how much ours have moved."""
    ours = made(16, 4, 8)
    twin, start = deepcopy(ours), deepcopy(ours)
    theirs = Released(twin)
    for i in range(iterations):
        x0 = Draws(1, i, range(16)).normal(torch.empty(16, 3, 16, 16)).tanh()
        ours.iterate(x0, None, Draws(0, i, range(16)))
        theirs.iterate(x0, Draws(0, i, range(16)))
    velocities = float((ours.auxiliary.s2 - theirs.s2).abs().max())
    return max(_apart(ours, twin), velocities), _apart(ours, start)


def _apart(a: MaxEntIRL, b: MaxEntIRL) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def trajectories(B: int, T: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(B, 3, size, size, generator=generator) for _ in range(T + 1)]
    return states, [torch.randn(B, 3, size, size, generator=generator) for _ in range(T)]


def our_bookkeeping(states: list[Tensor], auxiliary: Auxiliary) -> Rollout:
    """What a rollout keeps and a value sweep looks up, the networks left out."""
    T, B = len(states) - 1, len(states[0])
    kept, moves = states[0].new_empty(T + 1, *states[0].shape), states[0].new_empty(T, B)
    kept[0] = states[0]
    for k in range(T):
        kept[k + 1] = states[k + 1]
        moves[k] = (kept[k + 1] - kept[k]).square_().flatten(1).mean(1)
    roll = Rollout(kept, moves)
    auxiliary.adapt(moves.sum(1) / B, 0.99)
    for k in reversed(range(T)):
        _ = (roll.states[k], roll.states[k + 1], auxiliary.of(roll, k))
    return roll


def their_bookkeeping(states: list[Tensor], means: list[Tensor], s2: Tensor) -> Buffer:
    buffer = fill(states, means)
    s2 = 0.99 * s2 + 0.01 * velocities(states)
    for k in reversed(range(len(means))):
        order = torch.randperm(len(means) * len(states[0]))
        x, x_next, _ = rows_of(buffer, k, order)
        _ = (x_next - x).square().flatten(1).mean(1) / (2 * s2[k])
    return buffer


@contextmanager
def saved(parameters: list[Tensor]) -> Iterator[list[int]]:
    """Bytes that autograd keeps for backward passes, weights not counted: the most at one time."""
    skip = {p.data_ptr() for p in parameters}
    held: dict[int, int] = {}
    most = [0]

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in skip:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            most[0] = max(most[0], sum(held.values()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield most


def activations(B: int, size: int, width: int) -> tuple[int, int]:
    irl = made(size, 4, width)
    x, x_next = torch.randn(2, B, 3, size, size)
    weights = list(irl.value.parameters())
    states = torch.stack([x, x_next, x_next, x_next, x_next])
    roll = Rollout(states, (states[1:] - states[:-1]).square().flatten(2).mean(2))
    with saved(weights) as ours:
        irl._value_step(roll, 0, None, None)
    released = Released(irl)
    with saved(weights) as theirs:
        loss = released.value_loss(x, x_next, 0)
        loss.backward()
    return ours[0], theirs[0]


def value_passes(B: int, size: int, width: int) -> dict[str, Callable[[], object]]:
    irl = made(size, 4, width)
    x = torch.randn(B, 3, size, size)

    def through(*held: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with frozen(*held):
                leaf = x.clone().requires_grad_()
                mean(irl.value(leaf, 1)).backward()
            irl.value.zero_grad()

        return run

    return {"ours": through(irl.value), "theirs": through()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(header())
    B, T, size = 128, 10, 32
    print(f"trajectories of {B} x 3 x {size} x {size} in {T} steps; value nets of 32 and 16 channels, 16 rows")
    states, means = trajectories(B, T, size)
    irl = made(size, T, 8)
    roll, buffer = our_bookkeeping(states, irl.auxiliary), fill(states, means)
    kept, theirs = roll.states.nbytes + roll.moves.nbytes, buffer.bytes
    books = interleaved(
        {
            "ours": lambda: our_bookkeeping(states, irl.auxiliary),
            "theirs": lambda: their_bookkeeping(states, means, irl.auxiliary.s2),
        },
        args.rounds, clock=clock,
    )  # fmt: skip
    own, released = activations(16, size, 32)
    passes = interleaved(value_passes(16, size, 16), args.rounds, clock=clock)
    gap, moved = difference()
    figures = {
        "trajectory, in (T + 1) B D floats": (kept / ((T + 1) * states[0].nbytes), ""),
        "trajectory memory": (theirs / kept, f"{theirs / 1e6:.1f} against {kept / 1e6:.1f} MB"),
        "bookkeeping time": (books["theirs"].least / books["ours"].least, _ms(books)),
        "activations of a value step": (released / own, f"{released / 1e6:.1f} against {own / 1e6:.1f} MB"),
        "value pass of the policy step": (passes["theirs"].least / passes["ours"].least, _ms(passes)),
        "difference of the trained weights": (gap, f"after 3 iterations of both, which moved them by {moved:.2g}"),
    }
    failed = False
    for name, (figure, told) in figures.items():
        word, bar = BARS[name]
        good = figure <= bar if word == "at most" else figure >= bar
        failed |= not good
        print(f"{name:36s}{figure:10.3g}  {word} {bar:g}: {'ok' if good else 'MISSED'}  {told}")
    return int(args.check and failed)


def _ms(timings: dict) -> str:
    return f"{1e3 * timings['theirs'].least:.1f} against {1e3 * timings['ours'].least:.1f} ms"


if __name__ == "__main__":
    raise SystemExit(main())
