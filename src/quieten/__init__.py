"""Quieten: diffusion models with less noise. Everything is imported when it is first used (PEP 562)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_WHERE = {
    "gaussian": ["POINT", "Gaussian"],
    "process": ["FLOW", "VE", "VP", "Process"],
    "noise": ["Draws", "Noise"],
    "schedule": [
        "Cosine", "Linear", "LinearBeta", "LogNormal", "Power", "Rectified", "Schedule", "Table",
        "churned", "corrected", "karras",
    ],
    "denoiser": ["Denoiser", "Preconditioned", "convert", "edm", "iddpm", "ve", "vp"],
    "wrap": ["Clipped", "Counted", "Extrapolated", "WithCovariance", "dynamic"],
    "guidance": ["ClassifierFree", "Gradient", "Guidance", "Guided", "Likelihood"],
    "guiding.guides": ["Classified", "Energy", "Similarity"],
    "guiding.measurements": ["Consistent", "Downsample", "Grey", "LinearMap", "Mask", "Measured"],
    "guiding.classify": ["NoisyClassifier"],
    "transition": ["Ancestral", "Churn", "Hushed", "Langevin", "Step", "Transition"],
    "solver": ["RK2", "RK4", "AdamsBashforth", "Euler", "Exponential", "Heun", "RungeKutta"],
    "solvers.adaptive": ["RK45"],
    "solvers.sde": ["EulerMaruyama"],
    "solvers.plms": ["PLMS", "PNDM"],
    "solvers.dpm": ["Singlestep", "UniPC"],
    "split": ["Projected", "Split"],
    "guiding.splits": ["SPLITS"],
    "guiding.kick": ["EulerKick", "Kick", "MultistepKick", "StagedKick", "SubCycled"],
    "guiding.quadratic": ["ExactKick", "ImplicitKick", "Quadratic"],
    "allocator": ["keep_freed_memory"],
    "sampling": ["generate", "sample", "trajectory"],
    "likelihood": ["Bound", "elbo", "evaluate", "fit_decoder"],
    "likelihoods.density": ["log_likelihood"],
    "likelihoods.decoders": ["Decoder", "Dequantised", "Discretised", "Flat", "Pixels", "Plain"],
    "solvers.grids": ["dp_seg", "dp_vb", "edge_costs", "take"],
    "likelihoods.bound": ["VariationalBound"],
    "likelihoods.hybrid": ["Hybrid"],
    "encoder": ["Contraction", "Encoder", "LearnedEncoder"],
    "encoding.encoded": ["Encoded", "EncodedFlow"],
    "objective": ["Batch", "Denoising", "Objective", "Update"],
    "target": ["StableTarget", "TargetStats", "stable_target"],
    "targets.pools": ["BankPool", "ClassPool", "ClusterPool", "GatherPool", "LoaderPool", "ReferencePool", "References"],
    "targets.diagnosis": ["TargetVariance", "target_variance"],
    "oracle": ["FiniteData", "GaussianData", "MixtureData", "Oracle"],
    "basis": ["DCT"],
    "covariance": ["Analytic", "Fisher", "HessianDiagonal", "Residual", "SecondMoment", "Unit", "VarianceSource"],
    "covariances.heads": ["make_head"],
    "covariances.jacobian": ["Probed", "posterior_covariance"],
    "covariances.matching": ["CovarianceMatching"],
    "covariances.lanczos": ["Lanczos"],
    "training.source": ["open_source"],
    "covariances.stored": ["load_variance"],
    "covariances.fit": ["fit_variance"],
    "solvers.samplers": ["SAMPLERS", "sampler"],
    "tuning.policy": ["Policy", "Rollout"],
    "tuning.tuned": ["Tuned"],
    "tuning.policy_schedule": ["Consistency", "edm_grid", "fastdpm", "moment_std"],
    "tuning.adapters": [],
    "tuning.stored": ["load_policy", "save_policy"],
    "comparing.judge": ["Judge"],
    "comparing.lineup": ["Entrant"],
    "tuning.policy_gradient": ["FullGradient", "PolicyGradient"],
    "tuning.settings": ["Settings"],
    "guiding.value_guide": ["ValueGuidance", "ValueKick"],
    "imitation": ["MaxEntIRL"],
    "tuning.running_cost": ["Auxiliary", "expected_cost", "running_cost", "time_costs"],
    "training.config": ["load_recipe", "recipe_names"],
    "training.runs": ["Run", "export", "load"],
    "training.hub": ["from_pretrained", "push_to_hub"],
    "fit": ["train"],
    "tuning.tune": ["tune_policy"],
    "tuning.tune_start": ["Start"],
    "tuning.monitor": ["diagnose"],
    "tuning.borrowed": ["EncoderEnergy", "EncoderValue"],
    "metrics.features": ["Extractor", "Statistics"],
    "metrics": [
        "Manifold", "Memorisation", "auroc", "calibration", "energy_distance", "frechet", "kid", "memorisation", "prdc",
        "sliced_wasserstein",
    ],
    "tuning.energies": ["PerceptronValue", "ResidualValue", "default_value"],
    "tuning.reconstruction": ["AutoencoderEnergy", "autoencoder"],
    "tuning.reward": ["RewardEnergy", "RewardTuning", "reward_settings", "tune_to_reward"],
    "metrics.scores": [],
    "interop": ["from_diffusers", "to_diffusers"],
    "interop.optimal": ["OptimalCovarianceScheduler", "VarianceUNet"],
}  # fmt: skip
_EXPORTS = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value
        return value
    if any(name == module.split(".")[0] for module in _WHERE):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
