"""Runs on the hub: what goes there, what comes back, and what is said when it refuses. No network: a folder stands in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

from conftest import Type
from helpers import refuses
from quieten.covariances.stored import fingerprint, load_variance, make_variance, save_variance
from quieten.training.hub import from_pretrained, push_to_hub
from quieten.training.runs import Checkpoint, Run, build_update
from quieten.training.source import open_source
from toy import toy_run


class Hub:
    """Repositories as folders, behind the functions of huggingface_hub that are used."""

    def __init__(self, root: Path):
        self.root, self.commits, self.made = root, [], {}

    def __call__(self, token: Any = None, library_name: str = "") -> Hub:
        assert library_name == "quieten"
        return self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> huggingface_hub.RepoUrl:
        assert exist_ok
        if repo_id.startswith("others/"):
            raise OSError("403 Forbidden: you have no rights\nto this repository")
        if repo_id == "no/network":
            raise HTTPError("[Errno -2] Name or service not known")
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.made.setdefault(repo_id, private)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def file_exists(self, repo_id: str, name: str) -> bool:
        return (self.root / repo_id / name).is_file()

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> None:
        self.commits.append(sorted(part.path_in_repo for part in operations))
        for part in operations:
            file = self.root / repo_id / part.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            with part.as_file() as content:
                file.write_bytes(content.read())

    def hf_hub_download(self, repo_id: str, name: str, **options: Any) -> str:
        if not (self.root / repo_id).is_dir():
            raise LocalEntryNotFoundError("nothing in the cache, and no network")
        if not self.file_exists(repo_id, name):
            raise EntryNotFoundError(f"no {name}")
        return str(self.root / repo_id / name)

    def snapshot_download(self, repo_id: str, allow_patterns: list[str], **options: Any) -> str:
        if repo_id == "me/broken":
            raise ConnectionError("the line went dead")
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with random weights and a fitted variance."""
    torch.manual_seed(0)
    run = toy_run(tmp_path_factory.mktemp("runs") / "toy")
    tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in build_update(run.recipe).state_dict().items()}
    run.save(Checkpoint(1, tensors, tensors, {}))
    denoiser, options = run.denoiser(), {"head": "simple", "basis": "pixel", "block": 4, "link": "unit", "cap": 1.0}
    facts = {"kind": "ocm", **options, "trunk": fingerprint(denoiser)}
    save_variance(run.path / "variance", "ocm", make_variance("ocm", denoiser, **options), facts)  # type: ignore[arg-type]
    return run


def test_what_goes_up_comes_back(hub: Hub, run: Run) -> None:
    assert push_to_hub(run, "toy", private=True) == "https://huggingface.co/me/toy"
    assert hub.made == {"me/toy": True}
    assert hub.commits == [["README.md", "config.yaml", "ema.safetensors", "variance/ocm.safetensors"]]
    x, lam = torch.randn(2, 1, 8, 8), 0.5
    for back in (from_pretrained("me/toy", revision="main"), from_pretrained(str(run.path)), open_source("me/toy").denoiser):
        label = torch.tensor([0, 1])
        assert torch.equal(back(x, lam, label=label).mean, run.denoiser()(x, lam, label=label).mean)
    source = open_source("me/toy", device="cpu")
    assert source.home == Path()
    assert source.variances[0] == Path("variance/me--toy")
    load_variance(source.variances, "ocm", source.denoiser)
    assert source.classes == ("top", "bottom")


def test_the_card_is_the_owners_once_it_is_there(hub: Hub, run: Run) -> None:
    push_to_hub(run.path, "me/toy")
    card = hub.root / "me/toy/README.md"
    assert "quieten sample me/toy" in card.read_text()
    card.write_text("mine")
    push_to_hub(run.path, "me/toy")
    assert card.read_text() == "mine"
    assert len(hub.commits) == 2


def test_the_command(typed: Type, hub: Hub, run: Run, tmp_path: Path) -> None:
    ran = typed("export", run.path, tmp_path / "toy.safetensors", "--hub", "me/toy", "--private")
    assert ran.code == 0, ran.err
    assert ran.out.split() == [str(tmp_path / "toy.safetensors"), "https://huggingface.co/me/toy"]
    ran = typed("sample", "me/toy", "--steps", 1, "-n", 2, "--transition", "ocm")
    assert ran.code == 0, ran.err
    assert list(Path().glob("*.png"))
    assert not (hub.root / "me/toy/samples").exists()


def test_refusals(typed: Type, hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refuses("others/toy", "403 Forbidden", "hf auth login"):
        push_to_hub(run, "others/toy")
    with refuses("no/network", "cannot be reached", "Name or service not known"):
        push_to_hub(run, "no/network")
    with refuses("train it first"):
        push_to_hub(toy_run(tmp_path / "new"), "me/new")
    with refuses("`repo_id` 'me/nothing'", "no run"):
        from_pretrained("me/nothing")
    shutil.copytree(run.path, hub.root / "me/broken")
    with refuses("me/broken", "the line went dead"):
        open_source("me/broken")
    (hub.root / "me/pipeline").mkdir()  # a repository, but no run: diffusers is asked
    with pytest.raises(ValueError, match="me/pipeline has neither"):
        open_source("me/pipeline")
    assert not hub.commits
    for options, words in (((), "nothing to write"), (("--hub", "me/x", "--weights", "model"), "--weights model"),
                           (("x.bin",), "must end in .safetensors")):  # fmt: skip
        ran = typed("export", run.path, *options)
        assert ran.code == 2
        assert words in ran.err
        assert len(ran.err.strip().splitlines()) == 1
