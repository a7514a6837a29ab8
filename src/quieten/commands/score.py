"""`quieten score`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import Dataset, Order
from ..datasets.pictures import UndividedError
from ..files import writing
from ..metrics.ranking import auroc
from ..metrics.result import Result
from ..metrics.scores import denoising_errors, neighbour_distance, reconstruction_error
from ..progress import Progress
from ..training.source import Source, open_source
from .scored import Scored, write_scores
from .variance import examples

__all__ = ["BY", "score", "tuned_energy"]

BY = {
    "energy": "the energy that a policy was tuned with",
    "loss": "the denoising loss, mean squared error of the noise",
    "elbo": "the bound on -log p, nats per dimension",
    "pca": "squared distance to the principal components of normal training data",
    "knn": "mean distance to the nearest normal training data",
    "detector": "an energy trained by DxMI on normal training data, on the unit sphere",
}


def score(
    source: str,
    data: str,
    *,
    by: str | None = None,
    policy: str | None = None,
    normal: str | None = None,
    against: str | None = None,
    split: str | None = None,
    n: int | None = None,
    levels: int = 8,
    seed: int = 0,
    out: Path | None = None,
    batch: int = 256,
    weights: str = "ema",
    device: str | None = None,
) -> Result | None:
    """Scores examples, writes numbers and pictures, prints where they are; the arguments are the command's options.

    Returns:
        The area under the ROC curve, where it is known which examples are strange.

    Raises:
        ValueError: For options that make no sense together, or that the model or the data cannot serve.
    """
    if by is not None and by not in BY:
        from ..training.parts import nearest

        raise ValueError(f"`--by {by}` is unknown{nearest(by, BY)} (known: {', '.join(BY)})")
    if normal is not None and against is not None:
        raise ValueError("`--normal` says which classes are normal, `--against` that all of DATA is: give one of them")
    opened = open_source(source, weights, device)
    names = _policies(opened)
    by = ("energy" if policy is not None or names else "loss") if by is None else by
    if by == "energy" and not names and policy is None:
        raise ValueError("`--by energy` needs a policy: tune one with `quieten tune`, or take --by loss")
    learned = by in ("pca", "knn", "detector")
    tests, strange, split = _tests(opened, data, against, normal, split, n, seed)
    x0 = tests.all()
    folder = _folder(opened, out, f"{tests.name}-{split}-{by}")
    trained = _normal_training(opened, data, normal) if learned else None
    scores, where = _measure(by, opened, tests, x0, trained, policy or (names[-1] if names else ""), levels, seed, batch)
    scored = Scored(scores, where, x0, tests.labels, strange, tests.classes)
    area = None
    if strange is not None:
        area = auroc(scores, strange, by=BY[by], reference_name=tests.name, seeds=(seed,), weights=opened.weights)
    protocol = {
        "source": source, "weights": opened.weights, "data": data, "split": split, "by": by, "what": BY[by], "normal": normal,
        "against": against, "seed": seed, "n": len(x0),
    }  # fmt: skip
    write_scores(folder, scored, area, protocol)
    told = f"from {float(scores.min()):.4g} to {float(scores.max()):.4g}, median {float(scores.median()):.4g}"
    if split == "whole":
        print(f"{data} has no test data of its own: {'learned from and ' if learned else ''}scored as a whole")
    print(f"{BY[by]}: {len(x0):,} examples, {told}")
    if area is not None:
        print(area)
    print(folder)
    return area


# ---- what is scored


def _tests(
    opened: Source, data: str, against: str | None, normal: str | None, split: str | None, n: int | None, seed: int
) -> tuple[Dataset, Tensor | None, str]:
    """What is scored, which of it is strange if that is known, and which part of the data that is."""
    whole, part = _part(opened, data, split, split is None)
    tests = _some(whole, n, seed)
    _check(opened, tests)
    if against is not None:
        others = _some(_part(opened, against, split, True)[0], n, seed)
        _check(opened, others)
        both = torch.cat([tests.all(), others.all()])
        strange = torch.arange(len(both)) >= len(tests)
        return Dataset(f"{tests.name}-against-{others.name}", both, None, ()), strange, part
    if normal is None:
        return tests, None, part
    if tests.labels is None:
        raise ValueError(f"`--normal` needs labels, {tests.name} has none: leave it out, or use --against")
    return tests, ~torch.isin(tests.labels, torch.tensor(_numbers(normal, tests.classes))), part


def _part(opened: Source, data: str, split: str | None, or_whole: bool) -> tuple[Dataset, str]:
    """A split of some data, "test" for None, and its name; data that are not divided as a whole, where that will do."""
    split = "test" if split is None else split
    try:
        return examples(opened, data, split), split
    except UndividedError:
        if not or_whole:
            raise
        return examples(opened, data), "whole"


def _some(data: Dataset, n: int | None, seed: int) -> Dataset:
    if n is None or n >= len(data):
        return data
    return data.subset(Order(len(data), n, seed).indices(0).sort().values)


def _check(opened: Source, data: Dataset) -> None:
    shape = opened.denoiser.shape
    if shape is not None and data.shape != tuple(shape):
        raise ValueError(f"{data.name} has examples of shape {data.shape}, this model {tuple(shape)}: give other data")


def _numbers(names: str, classes: tuple[str, ...]) -> list[int]:
    from ..training.parts import nearest

    known = {name.lower(): i for i, name in enumerate(classes)} | {str(i): i for i in range(len(classes))}
    out = []
    for name in (part.strip() for part in names.split(",")):
        if name.lower() not in known:
            raise ValueError(f"`--normal {name}` is no class{nearest(name, classes)} (classes: {', '.join(classes)})")
        out.append(known[name.lower()])
    return out


def _normal_training(opened: Source, data: str, normal: str | None) -> Tensor:
    """Training examples of the normal classes, of all without `--normal`."""
    train = examples(opened, data, "train")
    if normal is not None and train.labels is not None:
        train = train.subset(torch.isin(train.labels, torch.tensor(_numbers(normal, train.classes))))
    if not len(train):
        raise ValueError(f"`--normal {normal}` has no training examples in {train.name}")
    return train.all()


# ---- scores


def _measure(
    by: str,
    opened: Source,
    tests: Dataset,
    x0: Tensor,
    trained: Tensor | None,
    policy: str,
    levels: int,
    seed: int,
    batch: int,
) -> tuple[Tensor, Tensor | None]:
    """The scores, and the share of each position where there is one."""
    if trained is not None:
        if by == "detector":
            return _by_detector(trained, x0, seed), None
        return (reconstruction_error if by == "pca" else neighbour_distance)(trained, x0), None
    with Progress(len(x0), 0, by, unit="examples") as progress:
        if by == "energy":
            return _by_energy(tuned_energy(opened, policy), x0, batch, opened.denoiser.device, progress.update)
        cond = _unconditional(opened, tests)
        if by == "elbo":
            return _by_bound(opened, x0, cond, seed, batch, progress.update), None
        errors = denoising_errors(
            opened.denoiser, x0, _levels(opened, levels), cond=cond, seed=seed, batch=batch, progress=progress.update
        )
    return errors.flatten(1).mean(1), errors.mean(1) if errors.ndim == 4 else None


def _unconditional(opened: Source, tests: Dataset) -> dict[str, Tensor]:
    """Conditions that say nothing, so that a score does not know the class; labels where a model cannot do without."""
    n = len(tests)
    if opened.prompt is not None:
        raise ValueError("this model draws what a text says, and data have none: take --by energy, pca or knn")
    if opened.null or not opened.classes:
        return {name: torch.full((n,), value) for name, value in opened.null.items()}
    if tests.labels is None or len(tests.classes) != len(opened.classes):
        raise ValueError(f"this model needs labels of {len(opened.classes)} classes, and learned no null label: give the data "
                         "it was trained on, or --by pca")  # fmt: skip
    return {"label": tests.labels}


def _levels(opened: Source, count: int) -> list[float]:
    """Log-SNRs to measure the loss at: even in u on the curve of training, else along the model's own grid."""
    if opened.schedule is None:
        return [lam for lam in opened.grid(count, None).tolist() if abs(lam) < float("inf")]
    with torch.no_grad():
        return [float(lam) for lam in opened.schedule((torch.arange(count, dtype=torch.float64) + 0.5) / count)]


def _by_bound(
    opened: Source, x0: Tensor, cond: Mapping[str, Tensor], seed: int, batch: int, progress: Callable[[int], None]
) -> Tensor:
    from ..likelihood import evaluate, fit_decoder
    from ..likelihoods.decoders import Plain
    from ..transition import Ancestral

    grid = opened.grid(20, None)
    few = slice(0, min(128, len(x0)))
    some = {name: value[few] for name, value in cond.items()}
    clean, kernel = float(grid[-2]), Ancestral(spread=False)
    decoder = fit_decoder(
        Plain(), opened.denoiser, x0[few], clean, cond=some, seed=seed, encoder=opened.encoder, transition=kernel
    )
    bound = evaluate(
        opened.denoiser, x0, decoder, grid, cond=cond, seed=seed, batch=batch, encoder=opened.encoder, transition=kernel,
        progress=progress,
    )  # fmt: skip
    return bound.total / bound.dims


def _by_detector(trained: Tensor, x0: Tensor, seed: int) -> Tensor:
    from ..tuning.anomaly import Detector, Plan

    plan = Plan()
    with Progress(plan.pretrain + plan.iterations, 0, "detector", unit="steps") as progress:
        detector = Detector.fit(trained.flatten(1), plan, seed=seed, progress=lambda i, _: progress.update(i))
    return detector.score(x0.flatten(1))


@torch.no_grad()
def _by_energy(
    energy: nn.Module, x0: Tensor, batch: int, device: torch.device, progress: Callable[[int], None]
) -> tuple[Tensor, Tensor | None]:
    """Energies; of a value that tells classes apart, the least over classes, so that labels are not given away."""
    T, classes = getattr(energy, "T", None), int(getattr(energy, "classes", 0) or 0)
    per = getattr(energy, "per_position", None)
    scores, maps = [], []
    for rows in x0.split(batch):
        x = rows.to(device)
        labels = [torch.full((len(x),), c, device=device) for c in range(classes)]
        conds: list[dict[str, Tensor]] = [{"label": label} for label in labels] or [{}]
        each = torch.stack([energy(x, T, **cond) for cond in conds])
        scores.append(each.amin(0).cpu())
        if per is not None:
            places = torch.stack([per(x, T, **cond) for cond in conds])
            maps.append(places[each.argmin(0), torch.arange(len(x), device=device)].cpu())
        progress(sum(map(len, scores)))
    where = torch.cat(maps) if maps else None
    return torch.cat(scores), where if where is not None and where.ndim == 3 else None


def _policies(opened: Source) -> list[str]:
    """Names of the policies whose energy was kept beside them, the latest last."""
    found = [file.parent for folder in opened.policies for file in folder.glob("*/ema.safetensors")]
    return [folder.name for folder in sorted(found, key=lambda folder: (folder / "ema.safetensors").stat().st_mtime)]


def tuned_energy(opened: Source, name: str) -> nn.Module:
    """The energy that a policy was tuned with, as in its latest checkpoint: the averaged value, or the energy's own network.

    Arguments:
        opened: The model.
        name: Of the policy, a folder in one of `opened.policies`, or the path of such a folder.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    from ..training.runs import Run
    from ..training.weights import read_tensors, restore
    from ..tuning.stored import load_policy
    from ..tuning.tune_start import make_energy, make_value, start_of

    bare = name.removesuffix(".safetensors")
    folders = [Path(bare).expanduser()] if "/" in name or bare != name else [f / name for f in opened.policies]
    folder = next((f for f in folders if (f / "ema.safetensors").is_file()), None)
    if folder is None:
        known = ", ".join(_policies(opened)) or "none"
        raise ValueError(f"no policy {name!r} with its energy lies beside this model (known: {known}): the folder of that name "
                         "keeps it, tune one with `quieten tune`")  # fmt: skip
    recipe = Run.open(folder).recipe
    section = recipe.section("tune")
    if section is None:
        raise ValueError(f"{folder} was not made by `quieten tune`: name another policy")
    start = start_of(section.kind, dict(section.options))
    policy, classes = load_policy(opened.policies, name, opened.denoiser), len(recipe.data.classes)
    energy, prefix, weights = make_energy(policy, start, classes), "energy.", "model"  # of which no average is kept
    if energy is None:
        energy, prefix, weights = make_value(policy, start, classes), "value.", "ema"
    file = folder / f"{weights}.safetensors"
    tensors = {key.removeprefix(prefix): t for key, t in read_tensors(file)[0].items() if key.startswith(prefix)}
    energy.to(opened.denoiser.device)
    restore(energy, tensors, file)
    return energy.eval().requires_grad_(False)


def _folder(opened: Source, out: Path | None, name: str) -> Path:
    if out is None:
        home = opened.home
        out = home.parent / "scores" / name if home.name == "samples" else home / f"scores-{name}"
    out = out.expanduser()
    if out.is_file():
        raise ValueError(f"`--out {out}` must be a folder, it is a file: name another")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return out
