"""The classifier that measures samples: it learns, repeatably."""

import copy
import itertools

import pytest
import torch

from quieten.data import Dataset, load
from quieten.guiding.classify import NoisyClassifier, accuracy, lessons, train_classifier
from quieten.nets import Classifier


def trained(images, seed=0):
    torch.manual_seed(seed)
    net = Classifier(channels=1, classes=10, width=16, blocks=1)
    return train_classifier(net, load("digits"), images=images, batch=64, lr=1e-2, shift=1, seed=seed)


def test_it_learns_digits():
    share = accuracy(trained(12_000), load("digits", split="test"))
    assert share > 0.85, f"accuracy {share:.3f} on held-out digits"


def test_the_same_seed_gives_the_same_weights():
    first, again = (torch.cat([p.flatten() for p in trained(1_920).parameters()]) for _ in range(2))
    assert torch.equal(first, again)


def test_labels_are_needed():
    digits = load("digits")
    unlabelled = Dataset("digits", digits.images, None, ())
    with pytest.raises(ValueError, match="labels"):
        train_classifier(Classifier(1, 10), unlabelled)
    with pytest.raises(ValueError, match="labels"):
        accuracy(Classifier(1, 10), unlabelled)


# ---- noise-aware


def test_lessons_go_on_bit_for_bit():
    def net():
        torch.manual_seed(3)
        return NoisyClassifier(Classifier(channels=1, classes=10, width=8, blocks=1))

    options = {"steps": 12, "batch": 16, "mirror": False, "smoothing": 0.0, "schedule": net().schedule()}
    whole, parts = net(), net()
    for _ in lessons(whole, load("digits"), **options):
        pass
    step, _, optimiser = next(itertools.islice(lessons(parts, load("digits"), **options), 4, None))
    assert step == 5
    again = net()
    again.load_state_dict(parts.state_dict())
    for _ in lessons(again, load("digits"), begin=(5, copy.deepcopy(optimiser.state_dict())), **options):
        pass
    first, second = (torch.cat([p.flatten() for p in model.parameters()]) for model in (whole, again))
    assert torch.equal(first, second)


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    net = NoisyClassifier(Classifier(channels=1, classes=10, width=8, blocks=1))
    before = torch.get_rng_state()
    train_classifier(net, load("digits"), images=64, batch=16, schedule=net.schedule())
    assert torch.equal(torch.get_rng_state(), before)


def test_levels_beyond_its_range_count_as_the_nearest():
    net = NoisyClassifier(Classifier(channels=1, classes=3, width=8, blocks=1), range=(-4.0, 4.0)).eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net(x, 7.0), net(x, 4.0))
    assert torch.equal(net(x, torch.tensor([-9.0, -5.0])), net(x, -4.0))
    for bad in ((4.0, -4.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="range"):
            NoisyClassifier(Classifier(1, 3), range=bad)
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\)"):
        NoisyClassifier(Classifier(1, 3), shape=(1, 8, 8))(torch.zeros(2, 1, 9, 9), 0.0)


def test_the_zoo_classifier_is_as_accurate_as_its_card_says():
    classifier = NoisyClassifier.load("zoo:fashion-mnist-noisy")
    try:
        test = load("fashion-mnist", split="test").subset(slice(2000))
    except ValueError:
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    for lam, share in ((9.0, 0.889), (3.0, 0.882), (-1.0, 0.739), (-5.0, 0.237)):
        got = accuracy(classifier, test, lam=lam)
        assert abs(got - share) < 0.04, f"accuracy {got:.3f} at log-SNR {lam}"
