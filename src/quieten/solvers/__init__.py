r"""More solvers, all transitions, and what they are called; `solver` has the first ones.

adaptive  The probability-flow ODE to a tolerance: every example with steps of its own.
dpm       Fast solvers in log-SNR beside `Exponential`: DPM-Solver++ in single steps, and UniPC.
grids     Which K of N levels to visit: fixed spacings, and the least-cost paths of two dynamic programmes.
plms      Pseudo linear multistep methods as they were released: constant coefficients, and starts of their own.
samplers  Samplers by name: what the command line, recipes and reports call a transition and its grid.
sde       The reverse diffusion as it is written down, in Euler steps.
"""
