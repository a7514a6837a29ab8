r"""What to guide with, and how the guidance is integrated; `guidance` and `split` are how it begins.

classify      Classifiers: the clean one whose features measure samples, and the one that knows noise and guides.
guides        Log-likelihoods to guide with: a classifier, the likeness to a text or an image, an energy.
kick          Kicks: how a splitting integrator follows the guidance alone, over an interval of sigma / alpha.
measurements  Linear measurements y = H x0 + noise: inpainting, colourisation, super-resolution, and the ways to obey
              them.
quadratic     Guidance by a linear measurement, and kicks that solve it without a limit on the step.
splits        Split schemes by name: what the command line and reports call a transition that keeps denoiser and guidance
              apart.
stability     Which solver survives which guidance: steps, scales and solvers tried against a path of a thousand steps.
value_guide   Guidance by a tuned value: downhill, towards lower cost to go.
"""
