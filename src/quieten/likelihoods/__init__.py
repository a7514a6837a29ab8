r"""The parts of a variational bound and of a flow's likelihood; `likelihood` puts them together.

bound     The variational bound as a loss: VDM, and DiffEnc when an encoder takes part.
decoders  Decoders: the last term of a variational bound, -log P(data | x_t at the cleanest level).
density   Exact likelihood of a denoiser by its probability-flow ODE, which carries densities along.
hybrid    The hybrid loss of Improved DDPM: denoising for the mean, the variational bound for the range of the variance.
learned   Schedules that are learned with the denoiser: the polynomial and the monotone network of VDM, with ends that
          stay put.
widened   Steps whose variance is that which makes the variational bound smallest.
"""
