"""What a training step of DiffEnc and its decoder cost, beside the same loss computed quantity by quantity.

    python benchmarks/diffenc.py [--check] [--rounds 5] [--threads 1]

Alternatives, written here after the released code's structure: the encoder asked anew for x_0, x_1, x_t, y, the derivative of
x_t and that of y (6 primal and 2 tangent passes, where one call gives y with its derivative and another both ends); and the
decoder's softmax over all 256 values of every pixel. Processor time, least of interleaved rounds; the losses agree to 1e-6.
Passes of the encoder are counted, and what autograd keeps of the decoder is measured. The row "lean" is the option of that
name, which encodes a quarter of the batch at the noisy end and nothing at the clean one.
With --check the exit status says whether every bar is met: 1.4 for the step, 20 and 4 for memory and time of the decoder.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from common import header, interleaved
from quieten.denoiser import Preconditioned
from quieten.encoder import LearnedEncoder
from quieten.encoding.encoded import Encoded
from quieten.gaussian import spread_over
from quieten.likelihoods.bound import VariationalBound
from quieten.likelihoods.decoders import Flat, Pixels
from quieten.networks.vdm_nets import EncoderUNet, ScoreUNet
from quieten.noise import Draws
from quieten.objective import Batch
from quieten.process import VP
from quieten.schedule import Linear

__all__ = ["main"]

BARS = {"step": 1.4, "memory": 20.0, "time": 4.0, "error": 1e-5, "loss": 1e-6}
B, SHAPE = 4, (3, 32, 32)
PIXELS = Pixels(centred=True)


def squares(lam: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return spread_over(torch.sigmoid(lam), x), spread_over(torch.sigmoid(-lam), x)


def separately(net: EncoderUNet, denoiser: Preconditioned, x: Tensor, u: Tensor, eps: Tensor, eps0: Tensor) -> Tensor:
    """The loss (B,) in nats, every quantity of the encoder by a call of its own."""
    schedule = Linear(13.3, -5.0)
    lam, (top, bottom) = schedule(u), schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))

    def y_of(level: Tensor) -> Tensor:
        return net(x, level).tanh()

    def encode(level: Tensor) -> Tensor:
        a2, s2 = squares(level, x)
        return a2 * x + s2 * y_of(level)

    everywhere = [level.expand(len(x)) for level in (top, bottom)]
    x_0, x_1, x_t, y = encode(everywhere[0]), encode(everywhere[1]), encode(lam), y_of(lam)
    torch.func.jvp(encode, (lam,), (torch.ones_like(lam),))  # the released code logs this derivative
    _, y_rate = torch.func.jvp(y_of, (lam,), (torch.ones_like(lam),))
    a2, s2 = squares(lam, x)
    z, v = a2.sqrt() * x_t + s2.sqrt() * eps, a2.sqrt() * eps - s2.sqrt() * x_t
    v_hat = denoiser.predict(z, lam, "v")
    x_hat = a2.sqrt() * z - s2.sqrt() * v_hat
    error = v - v_hat + s2.sqrt() * (x_hat - x_t + y - y_rate)
    diffusion = 0.5 * float(top - bottom) * (a2 * error.square()).flatten(1).sum(1)
    a2, s2 = torch.sigmoid(bottom), torch.sigmoid(-bottom)
    prior = 0.5 * ((a2.to(x) * x_1.square()).flatten(1).sum(1) + ((s2 - 1 - s2.log()) * math.prod(x.shape[1:])).to(x))
    z_0 = torch.sigmoid(top).sqrt().to(x) * x_0 + torch.sigmoid(-top).sqrt().to(x) * eps0
    return diffusion + prior + Flat(VP, PIXELS)(None, x, z_0, top)


def every_value(z: Tensor, x: Tensor, lam: float) -> Tensor:
    """-log of the softmax over all values, (B,) nats."""
    values = PIXELS.values.to(z)
    logits = -0.5 * math.exp(lam) * (z[..., None] / VP.scales(lam)[0] - values).square()
    return -torch.log_softmax(logits, -1).gather(-1, PIXELS.index(x)[..., None])[..., 0].flatten(1).sum(1)


def kept(f: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for going backward."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        f()
    return total


class Counted(EncoderUNet):
    rows = 0

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        self.rows += len(x)
        return super().forward(x, lam)


def steps(rounds: int) -> bool:
    """The training step: ratio of processor times, agreement of losses."""
    torch.manual_seed(0)
    net, denoiser = Counted(3, 32, 2, middle_groups=16, dropout=0.0), None
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.03)
    denoiser = Preconditioned(ScoreUNet(3, 64, 2, dropout=0.0), Encoded(VP), "v", lambda lam: -lam)
    x = 2 * (torch.randint(0, 256, (B, *SHAPE)) + 0.5) / 256 - 1
    batch, draws = Batch(x, torch.arange(B), {}), Draws(0, 0, range(B))
    options = {"schedule": Linear(13.3, -5.0), "decoder": Flat(VP, PIXELS), "encoder": LearnedEncoder(net)}
    ours, lean = VariationalBound(**options), VariationalBound(**options, lean=True)
    u, eps, eps0 = draws.stratified("u"), draws.normal(x, "eps"), draws.normal(x, "decoder")

    cases = {
        "ours": lambda: ours.terms(denoiser, batch, draws).total,
        "lean": lambda: lean.terms(denoiser, batch, draws).total,
        "separate calls": lambda: separately(net, denoiser, x, u, eps, eps0),
    }
    passes = {}
    for name, case in cases.items():
        net.rows = 0
        case()
        passes[name] = net.rows / B
    difference = float(((cases["ours"]() - cases["separate calls"]()) / cases["separate calls"]()).detach().abs().max())
    timings = interleaved(
        {name: lambda case=case: case().mean().backward() for name, case in cases.items()}, rounds, 1, time.process_time
    )
    ratio = timings["separate calls"].least / timings["ours"].least
    for name, timing in timings.items():
        print(f"step, {name:15s} {timing.least * 1e3:8.0f} ms CPU, {passes[name]:.2f} passes of the encoder an example")
    print(f"step: separate calls / ours {ratio:.2f} (bar {BARS['step']}), / lean "
          f"{timings['separate calls'].least / timings['lean'].least:.2f}; losses differ by {difference:.1e}")  # fmt: skip
    return ratio >= BARS["step"] and difference <= BARS["loss"]


def decoder(rounds: int) -> bool:
    """The reconstruction term: memory, time and error."""
    torch.manual_seed(0)
    lam = 13.3
    x = 2 * (torch.randint(0, 256, (B, *SHAPE)) + 0.5) / 256 - 1
    alpha, sigma = VP.scales(lam)
    z = (alpha * x + sigma * torch.randn_like(x)).requires_grad_()
    cases = {"ours": lambda: Flat(VP, PIXELS)(None, x, z, lam), "all values": lambda: every_value(z, x, lam)}
    wanted = every_value(z.detach().double(), x.double(), lam)
    errors = {name: float(((case().detach() - wanted) / wanted).abs().max()) for name, case in cases.items()}
    memory = {name: kept(case) for name, case in cases.items()}
    timings = interleaved(
        {name: lambda c=case: c().sum().backward() for name, case in cases.items()}, rounds, 1, time.process_time
    )
    for name in cases:
        print(f"decoder, {name:11s} {timings[name].least * 1e3:8.1f} ms CPU, {memory[name] / 2**20:6.2f} MiB kept, "
              f"relative error {errors[name]:.1e}")  # fmt: skip
    less, faster = memory["all values"] / memory["ours"], timings["all values"].least / timings["ours"].least
    print(
        f"decoder: all values / ours: memory {less:.0f} (bar {BARS['memory']:.0f}), time {faster:.1f} (bar {BARS['time']:.0f})"
    )
    return less >= BARS["memory"] and faster >= BARS["time"] and errors["ours"] <= BARS["error"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail unless every bar is met")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(header())
    passed = [steps(args.rounds), decoder(args.rounds)]
    print("every bar is met" if all(passed) else "a bar is missed")
    return int(args.check and not all(passed))


if __name__ == "__main__":
    raise SystemExit(main())
