r"""Posterior variances that are learned, kept or probed; `covariance` says what a source of variance is.

fit       Fitting a variance to a trained denoiser: heads by the training loop of runs, the table of Analytic-DPM by one
          pass.
heads     Small heads on frozen networks, and the taps that bring them the features before the network's own last layer.
jacobian  Products with the Jacobian of E[x0 | x_t], which is a covariance: Cov[x0 | x_t] = (sigma^2 / alpha) J.
lanczos   Kernels with the full covariance of a denoiser, drawn by a few products with its Jacobian.
matching  Training a head to predict the posterior variance of a frozen denoiser.
stored    Variances that were fitted to a denoiser: made by name, kept as files beside it, and read back.
"""
