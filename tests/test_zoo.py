"""What comes with the library: its cards say what the files are, and the models do what the cards say."""

import hashlib
from pathlib import Path

import pytest
import torch

import quieten
from quieten.classify import accuracy
from quieten.config import build_grid
from quieten.data import load
from quieten.features import Extractor
from quieten.nets import Classifier
from quieten.runs import load_with_recipe
from quieten.sampling import generate
from quieten.solver import Exponential
from quieten.wrap import Clipped

ZOO = Path(quieten.__file__).parent / "zoo"
FILES = sorted(ZOO.rglob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ZOO)))
def test_the_card_names_every_file_by_its_hash(file):
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (ZOO / "README.md").read_text()


def test_the_files_are_small():
    size = sum(file.stat().st_size for file in FILES)
    assert size <= 6 * 2**20, f"{size / 2**20:.1f} MiB"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'zoo:fashon'.*fashion-mnist"):
        quieten.load("zoo:fashon")
    with pytest.raises(ValueError, match=r"'fashon'.*fashion-mnist"):
        Extractor.zoo("fashon")


@pytest.fixture(scope="module")
def test_images():
    try:
        return load("fashion-mnist", split="test")
    except ValueError:
        pytest.skip("needs Debian's package dataset-fashion-mnist")


def classifier() -> Classifier:
    from safetensors.torch import load_file

    net = Classifier(channels=1, classes=10)
    weights = load_file(ZOO / "classifiers" / "fashion-mnist.safetensors")
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    return net.eval()


def test_the_classifier_is_as_accurate_as_its_card_says(test_images):
    share = accuracy(classifier(), test_images)
    assert abs(share - 0.9254) < 5e-4, f"accuracy {share:.4f}"


def test_the_extractor_is_that_classifier(test_images):
    extractor = Extractor.zoo("fashion-mnist")
    x, _ = test_images.batch(torch.arange(20))
    assert extractor.hash == hashlib.sha256((ZOO / "classifiers" / "fashion-mnist.safetensors").read_bytes()).hexdigest()
    torch.testing.assert_close(extractor.extract(x), classifier().features(x).detach())


def test_the_model_draws_the_classes_it_is_asked_for():
    denoiser, recipe = load_with_recipe("zoo:fashion-mnist")
    label = torch.arange(100) % 10
    x = generate(
        Clipped(denoiser), 100, grid=build_grid(recipe, 10), transition=Exponential(2), cond={"label": label}, batch=100
    )
    share = float((classifier()(x).argmax(1) == label).float().mean())
    assert share > 0.75, f"{share:.2f} of the samples are taken for the class asked for"
