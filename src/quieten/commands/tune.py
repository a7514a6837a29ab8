"""`quieten tune`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from ..files import given_name
from ..training.source import open_source
from ..tuning.tune import plan_for, tune_policy
from ..tuning.tune_start import Start, start_of
from ..tuning.yardstick import held_out
from .variance import examples

__all__ = ["tune"]

TRAINING = ("images", "batch", "lr")
SETTINGS = {
    "tau1": "tau1",
    "tau2": "tau2",
    "gamma": "gamma",
    "time_cost": "time_cost",
    "n_generator": "n_generator",
    "n_critic": "n_critic",
    "reduction": "reduction",
    "std_lr": "lr_std",
    "value_lr": "lr_value",
}
"""Options of the command -> fields of `tuning.Settings`."""


def tune(
    source: str,
    data: str,
    *,
    name: str | None = None,
    out: Any = None,
    distance: str = "auto",
    n: int = 1000,
    every: int | None = None,
    seed: int = 0,
    weights: str = "ema",
    device: str | None = None,
    changes: Sequence[str] = (),
    reward: str | None = None,
    **options: Any,
) -> bool:
    """Tunes a policy and keeps it; the arguments are the command's options. Returns whether it came to its end.

    Raises:
        ValueError: For options that make no sense, or data that do not fit.
    """
    given = {option: value for option, value in options.items() if value is not None}
    if "steps" in given:
        given["T"] = given.pop("steps")
    prize = None
    if reward is not None:
        from ..tuning.reward import load_reward

        if given.setdefault("method", "dxdp") != "dxdp":
            raise ValueError(f"`--reward` is what method dxdp tunes to (got --method {given['method']}): leave one of them out")
        prize = load_reward(reward)
        given.setdefault("last_std", 0.03)  # leaving the first policy costs the squared move over twice the variance
    elif given.get("method") == "dxdp":
        raise ValueError("`--method dxdp` tunes to a reward: give --reward module:function")
    settings = {SETTINGS[option]: given.pop(option) for option in list(given) if option in SETTINGS}
    _tidy(settings)
    settings |= _changes(changes)
    Start(**{key: value for key, value in given.items() if key not in TRAINING}, settings=settings)  # refuses at once
    opened = open_source(source, weights, device)
    wanted = dict(opened.tuning)
    if given.get("method") not in (None, wanted.get("kind")) or given.get("T") not in (None, wanted.get("T")):
        wanted = {}  # what the recipe says is for another method, or another number of steps
    method = given.pop("method", wanted.pop("kind", "dxmi"))
    wanted = {key: value for key, value in wanted.items() if value is not None and key not in ("kind", "trunk", "reward")}
    wanted["settings"] = {**wanted.get("settings", {}), **settings}
    wanted |= given
    training: dict[str, Any] = {key: wanted.pop(key) for key in TRAINING if key in wanted}
    training |= {"seed": seed} | ({} if every is None else {"preview_every": every})
    begun = start_of(method, wanted)
    plan = plan_for(begun)
    plan = type(plan)(**{**plan.model_dump(), **training})
    kept, held = held_out(examples(opened, data), data)
    tuned = tune_policy(
        opened, kept, held, name=name, out=out, start=begun, train=plan, distance=distance, n=n,
        reward=prize, reward_name=reward,
    )  # fmt: skip
    if os.environ.get("RANK", "0") != "0":
        return tuned.summary.done
    print(tuned.message)
    if tuned.file is not None:
        print(shlex.join(["quieten", "sample", source, "--policy", given_name(opened.policies, tuned.file)]))
    return tuned.summary.done


def _tidy(settings: dict[str, Any]) -> None:
    """Options of the command line as `Settings` has them."""
    if settings.get("time_cost") == "none":
        settings["time_cost"] = None
    count = settings.get("n_generator")
    if isinstance(count, str) and count != "all":
        if not count.isdigit():
            raise ValueError(f"`--n-generator {count}` must be a whole number, or all")
        settings["n_generator"] = int(count)


def _changes(changes: Sequence[str]) -> dict[str, Any]:
    """What `--set NAME=VALUE` says of the settings; the values are YAML."""
    out = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"`--set {change}` needs NAME=VALUE, such as value_resample=true")
        try:
            out[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"`--set {change}`: the value is not YAML; quote it") from None
    return out
