"""The ROC curve and the area under it, returned as every metric is."""

from __future__ import annotations

import json
import math

import pytest
import torch

import quieten
from helpers import refuses, within
from quieten.metrics import Result, auroc
from quieten.metrics.ranking import roc


def test_auroc_is_the_chance_and_scikit_learns() -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    generator = torch.Generator().manual_seed(0)
    for decimals in (0, 1, 6):  # ties in plenty, some, none
        scores = (torch.randn(300, generator=generator) * 2).round(decimals=decimals)
        strange = torch.rand(300, generator=generator) < 0.3
        scores[strange] += 1.0
        area = auroc(scores, strange)
        a, b = scores[strange].double()[:, None], scores[~strange].double()
        within(1e-12, abs(area.value - float(((a > b).double() + 0.5 * (a == b).double()).mean())), "area against all pairs")
        within(1e-12, abs(area.value - roc_auc_score(strange, scores)), "area against scikit-learn")
        alarms, finds = roc(scores, strange)
        within(1e-12, abs(float(torch.trapezoid(finds, alarms)) - area.value), "area under the curve")
        theirs = roc_curve(strange, scores, drop_intermediate=False)
        assert torch.allclose(alarms, torch.from_numpy(theirs[0]))
        assert torch.allclose(finds, torch.from_numpy(theirs[1]))
        assert (area.protocol.n_reference, area.protocol.n) == (int((~strange).sum()), int(strange.sum()))


def test_error_of_the_area_is_its_spread() -> None:
    """Over 400 redrawn samples."""
    generator = torch.Generator().manual_seed(1)
    strange = torch.arange(150) < 50
    areas = [auroc(torch.randn(150, generator=generator) + strange, strange) for _ in range(400)]
    spread = torch.tensor([a.value for a in areas]).std()
    told = sum(a.error for a in areas) / len(areas)
    print(f"spread {spread:.4f}, told {told:.4f}")
    assert told == pytest.approx(float(spread), rel=0.12)
    mean = sum(a.value for a in areas) / len(areas)
    truth = 0.5 * (1 + math.erf(1 / 2))  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    within(4 * float(spread) / 20, abs(mean - truth), "mean area less the truth")


def test_perfect_and_reversed() -> None:
    strange = torch.tensor([False, False, True, True])
    assert auroc(torch.tensor([0.0, 1, 2, 3]), strange).value == 1.0
    assert auroc(torch.tensor([3.0, 2, 1, 0]), strange).value == 0.0
    assert auroc(torch.ones(4), strange).value == 0.5
    lonely = auroc(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert lonely.uncertainty is None
    assert math.isnan(lonely.error)


def test_it_carries_its_protocol() -> None:
    scores, strange = torch.tensor([0.1, 0.4, 0.3, 0.9, 0.2]), torch.tensor([False, False, True, True, False])
    area = quieten.auroc(scores, strange, by="loss", reference_name="digits", seeds=(3,), weights="ema")
    assert isinstance(area, Result)
    assert area.error == area.uncertainty
    p = area.protocol
    assert (p.n, p.n_reference, p.reference, p.extractor, p.seeds, p.weights) == (2, 3, "digits", "loss", (3,), "ema")
    assert p.extra["direction"] == "high is strange"
    assert str(area) == f"AUROC {area.figure()} (n=2 against 3 of digits, by loss)"
    assert Result.from_dict(json.loads(json.dumps(area.to_dict()))) == area


def test_refusals() -> None:
    strange = torch.tensor([True, False])
    with refuses("`strange`", "both kinds"):
        auroc(torch.zeros(2), torch.tensor([True, True]))
    with refuses("NaN", "1 of 2"):
        auroc(torch.tensor([0.0, math.nan]), strange)
    with refuses("(N,)"):
        auroc(torch.zeros(2, 1), strange)
