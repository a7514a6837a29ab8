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
    "guides": ["Classified", "Energy", "Similarity"],
    "measurements": ["Consistent", "Downsample", "Grey", "LinearMap", "Mask", "Measured"],
    "classify": ["NoisyClassifier"],
    "transition": ["Ancestral", "Churn", "Hushed", "Langevin", "Step", "Transition"],
    "solver": ["RK2", "RK4", "AdamsBashforth", "Euler", "Exponential", "Heun", "RungeKutta"],
    "adaptive": ["RK45"],
    "sde": ["EulerMaruyama"],
    "plms": ["PLMS", "PNDM"],
    "dpm": ["Singlestep", "UniPC"],
    "split": ["Projected", "Split"],
    "splits": ["SPLITS"],
    "kick": ["EulerKick", "Kick", "MultistepKick", "StagedKick", "SubCycled"],
    "quadratic": ["ExactKick", "ImplicitKick", "Quadratic"],
    "allocator": ["keep_freed_memory"],
    "sampling": ["generate", "sample", "trajectory"],
    "likelihood": ["Bound", "elbo", "evaluate", "fit_decoder"],
    "density": ["log_likelihood"],
    "decoders": ["Decoder", "Dequantised", "Discretised", "Flat", "Pixels", "Plain"],
    "grids": ["dp_seg", "dp_vb", "edge_costs", "take"],
    "bound": ["VariationalBound"],
    "encoder": ["Contraction", "Encoder", "LearnedEncoder"],
    "encoded": ["Encoded", "EncodedFlow"],
    "objective": ["Batch", "Denoising", "Objective", "Update"],
    "target": ["StableTarget", "TargetStats", "stable_target"],
    "pools": ["BankPool", "ClassPool", "ClusterPool", "GatherPool", "LoaderPool", "ReferencePool", "References"],
    "diagnosis": ["TargetVariance", "target_variance"],
    "oracle": ["FiniteData", "GaussianData", "MixtureData", "Oracle"],
    "basis": ["DCT"],
    "covariance": ["Analytic", "Fisher", "HessianDiagonal", "Residual", "SecondMoment", "Unit", "VarianceSource"],
    "heads": ["make_head"],
    "jacobian": ["Probed", "posterior_covariance"],
    "matching": ["CovarianceMatching"],
    "lanczos": ["Lanczos"],
    "source": ["open_source"],
    "variance": ["load_variance"],
    "variance_fit": ["fit_variance"],
    "samplers": ["SAMPLERS", "sampler"],
    "policy": ["Policy", "Rollout"],
    "tuned": ["Tuned"],
    "policy_schedule": ["Consistency", "edm_grid", "fastdpm", "moment_std"],
    "adapters": [],
    "policies": ["load_policy", "save_policy"],
    "judge": ["Judge"],
    "lineup": ["Entrant"],
    "policy_gradient": ["FullGradient", "PolicyGradient"],
    "tuning": ["Settings"],
    "value_guide": ["ValueGuidance", "ValueKick"],
    "imitation": ["MaxEntIRL"],
    "running_cost": ["Auxiliary", "expected_cost", "running_cost", "time_costs"],
    "config": ["load_recipe", "recipe_names"],
    "runs": ["Run", "export", "load"],
    "hub": ["from_pretrained", "push_to_hub"],
    "fit": ["train"],
    "tune": ["tune_policy"],
    "tune_start": ["Start"],
    "monitor": ["diagnose"],
    "borrowed": ["EncoderEnergy", "EncoderValue"],
    "features": ["Extractor", "Statistics"],
    "metrics": [
        "Manifold", "Memorisation", "auroc", "calibration", "energy_distance", "frechet", "kid", "memorisation", "prdc",
        "sliced_wasserstein",
    ],
    "energies": ["PerceptronValue", "ResidualValue", "default_value"],
    "reconstruction": ["AutoencoderEnergy", "autoencoder"],
    "reward": ["RewardEnergy", "RewardTuning", "reward_settings", "tune_to_reward"],
    "scores": [],
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
    if name in _WHERE:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
