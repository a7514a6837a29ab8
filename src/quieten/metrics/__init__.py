"""How far drawn images are from real ones. A number never travels without the protocol that made it.

    Extractor -> features -> Statistics -> frechet_distance
                          -> kid, energy_distance, sliced_wasserstein, prdc, memorisation
    scores    -> auroc
    variances -> calibration

All of them are float64 on the CPU, whatever the images were. Randomness comes from explicit seeds: two calls with the
same arguments give the same digits, and the global generators are left alone. Nothing depends on the sizes of batches.
"""

from .calibrate import calibration
from .features import Extractor, Statistics
from .kernels import energy_distance, kid
from .manifold import Manifold, prdc
from .memory import Memorisation, memorisation
from .moments import frechet, frechet_distance
from .ranking import auroc
from .result import Protocol, Result
from .transport import sliced_wasserstein

__all__ = [
    "Extractor",
    "Manifold",
    "Memorisation",
    "Protocol",
    "Result",
    "Statistics",
    "auroc",
    "calibration",
    "energy_distance",
    "frechet",
    "frechet_distance",
    "kid",
    "memorisation",
    "prdc",
    "sliced_wasserstein",
]
