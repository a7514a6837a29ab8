"""The classifier that measures samples: it learns, repeatably."""

import pytest
import torch

from quieten.classify import accuracy, train_classifier
from quieten.data import Dataset, load
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
