"""Runs on the Hugging Face hub: a repository there is the folder of a run, without what only training needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..denoiser import Preconditioned
from .runs import Run, load
from .weights import brief

__all__ = ["KEPT", "fetched", "from_pretrained", "push_to_hub"]

KEPT = ("config.yaml", "ema.safetensors", "variance/*.safetensors", "policy/*.safetensors")
"""What of a run goes to the hub: enough to sample, to measure, and to tune on; no optimiser, no data."""

CARD = """---
library_name: quieten
tags: [diffusion]
---

# {name}

A diffusion model of {data}, trained with Quieten; `config.yaml` is its whole recipe.

```bash
quieten sample {repo} --steps {steps}
```

```python
import quieten

denoiser = quieten.from_pretrained("{repo}")
```
"""


def push_to_hub(
    run: Run | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a run of Quieten",
) -> str:
    """Puts a run on the hub, in one commit: recipe, averaged weights, fitted variances and tuned policies.

    A card is written if there is none yet. The recipe goes along as it is, with the name or path of its data.

    Arguments:
        run: A trained run, or its folder.
        repo_id: "owner/name", or "name" for your own; made if it is not there.
        private: Whether a new repository is; None is the owner's default.
        token: Of the account; None takes that of `hf auth login`.
        message: Of the commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: If the run has no weights yet, or the hub refuses.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    run.denoiser()  # what cannot be loaded is not worth a repository
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="quieten")
    files = [file for pattern in KEPT for file in sorted(run.path.glob(pattern))]
    operations = [CommitOperationAdd(file.relative_to(run.path).as_posix(), file) for file in files]
    with _refusals(repo_id, "log in with `hf auth login`, as somebody who may write there"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if not api.file_exists(url.repo_id, "README.md"):
            recipe = run.recipe
            card = CARD.format(name=recipe.name, data=recipe.data.name, repo=url.repo_id, steps=recipe.sample.steps)
            operations.append(CommitOperationAdd("README.md", card.encode()))
        api.create_commit(url.repo_id, operations, commit_message=message)
    return str(url)


def from_pretrained(repo_id: str, weights: str = "ema", device: torch.device | str = "cpu", **hub: Any) -> Preconditioned:
    """The denoiser of a run on the hub, in evaluation mode; for diffusers' models see `interop.from_diffusers`.

    Arguments:
        repo_id: "owner/name", or a run's folder.
        weights: As in `load`; the hub has "ema".
        device: Where to.
        **hub: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        ValueError: If there is no run of that name, or the hub cannot be reached.
    """
    if Path(repo_id).expanduser().is_dir():
        return load(repo_id, weights, device)
    folder = fetched(repo_id, **hub)
    if folder is None:
        raise ValueError(f"`repo_id` {repo_id!r} is no run of Quieten that can be read: look at its name and the network, or "
                         "use from_diffusers for a model of diffusers")  # fmt: skip
    return load(folder, weights, device)


def fetched(repo_id: str, **hub: Any) -> Path | None:
    """The folder of a run on the hub, downloaded once; None where there is no run, or it cannot be reached.

    Raises:
        ValueError: If the download fails halfway.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(repo_id, "config.yaml", **hub)
    except (OSError, ValueError, EntryNotFoundError):
        return None
    with _refusals(repo_id, "try again"):
        return Path(snapshot_download(repo_id, allow_patterns=list(KEPT), **hub))


@contextmanager
def _refusals(repo_id: str, remedy: str) -> Iterator[None]:
    """Errors of the hub in one line."""
    from huggingface_hub import errors

    no_network: type[Exception] = getattr(errors, "HTTPError", OSError)  # in some versions no OSError
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"the hub refuses {repo_id!r} ({brief(error)}): {remedy}") from error
    except no_network as error:
        raise ValueError(
            f"the hub cannot be reached for {repo_id!r} ({brief(error)}): try again where there is a network"
        ) from error
