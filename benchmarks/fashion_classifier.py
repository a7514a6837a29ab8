"""Trains the Fashion-MNIST classifier of the zoo, the fixed feature extractor that samples are measured with.

python benchmarks/fashion_classifier.py --out src/quieten/zoo/fashion-mnist-classifier.safetensors
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save

from quieten.classify import accuracy, train_classifier
from quieten.data import load
from quieten.files import write_atomic
from quieten.nets import Classifier


def main(out: Path, images: int, seed: int) -> None:
    """Trains, rounds the weights to half precision, measures the accuracy of the rounded ones, writes them."""
    data, test = load("fashion-mnist"), load("fashion-mnist", split="test")
    torch.manual_seed(seed)
    options = {"channels": 1, "classes": 10}
    net, started = Classifier(**options), time.perf_counter()
    train_classifier(
        net, data, images=images, seed=seed, progress=lambda n, loss: print(f"{n:8d} images, loss {loss:.3f}", flush=True)
    )
    seconds = time.perf_counter() - started
    half = {name: value.half() for name, value in net.state_dict().items()}
    net.load_state_dict({name: value.float() for name, value in half.items()})
    facts = {
        "options": json.dumps(options),
        "data": "fashion-mnist, train",
        "images": str(images),
        "seed": str(seed),
        "accuracy": f"{accuracy(net, test):.4f}",
        "seconds": f"{seconds:.0f}",
    }
    content = save({name: value.contiguous() for name, value in half.items()}, facts)
    write_atomic(out, content)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{out}: {parameters} parameters, accuracy {facts['accuracy']} on {len(test)} test images, {seconds:.0f} s, "
          f"SHA-256 {hashlib.sha256(content).hexdigest()}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=900_000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
