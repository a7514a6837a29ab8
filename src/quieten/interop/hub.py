"""Reading components from a local folder or from the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["FETCH", "Source", "first_line"]

FETCH = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Options of the hub that hold for every file."""


class Source:
    """A folder or a repository, and how to read from it."""

    def __init__(self, where: str | Path, subfolder: str | None, hub: dict[str, Any]):
        self.folder = Path(where).expanduser()
        self.local, self.inner, self.hub = self.folder.is_dir(), subfolder or "", hub
        self.name = str(self.folder) if self.local else str(where)
        if self.folder.is_file():
            raise ValueError(f"`source` {where} is a file: give the folder of a pipeline or model (save_pretrained writes one)")
        if not self.local and (isinstance(where, Path) or str(where).count("/") != 1 or str(where)[0] in "./~"):
            raise ValueError(f"`source` {str(where)!r} is no folder here, and no hub id of the form owner/name")

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the source; None when there is none of that name."""
        path = self.folder / self.inner / name if self.local else self._fetch(name)
        if path is None or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"`source` {self.name}: {name} is not JSON: {first_line(error)}") from error
        return content if isinstance(content, dict) else None

    def _fetch(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        options = {key: value for key, value in self.hub.items() if key in FETCH}
        try:
            path = f"{self.inner}/{name}" if self.inner else name
            return Path(hf_hub_download(self.name, path, **options))
        except LocalEntryNotFoundError as error:
            raise ValueError(f"`source` {self.name!r}: {name} is not in the cache and the hub cannot be reached: download it "
                             "where there is a network, or give a local folder") from error  # fmt: skip
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"`source` {self.name!r} cannot be read from the hub: {first_line(error)}") from error

    def component(self, cls: Any, name: str, **options: Any) -> Any:
        """One component, by the class that the caller chose; weights from safetensors only."""
        sub = "/".join(part for part in (self.inner, name) if part)
        if self.local:
            self._check_weights(self.folder / sub)
        where = f"`source` {self.name}" + (f", {name}" if name else "")
        fetch = {key: value for key, value in self.hub.items() if key in FETCH}
        try:
            made = cls.from_pretrained(str(self.folder) if self.local else self.name, subfolder=sub, **fetch, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"{where} cannot be loaded as a {cls.__name__} from safetensors: {first_line(error)}") from error
        if not isinstance(made, tuple):
            return made
        model, info = made
        if info["missing_keys"]:
            some = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(f"{where}: the weights lack {len(info['missing_keys'])} tensors of its {cls.__name__} ({some}, "
                             "...): the checkpoint belongs to another architecture")  # fmt: skip
        return model

    def model(self, cls: Any, name: str, plain: bool = False) -> nn.Module:
        """A model with all its weights; `plain` leaves the precision alone."""
        options = {"variant": self.hub["variant"]} if "variant" in self.hub else {}
        if "torch_dtype" in self.hub and not plain:
            options["torch_dtype"] = self.hub["torch_dtype"]
        made: nn.Module = self.component(cls, name, use_safetensors=True, output_loading_info=True, **options)
        return made.eval()

    def _check_weights(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"`source` {self.name} has no folder {folder.name}: the download or copy is incomplete")
        pickled = [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        if pickled and not list(folder.glob("*.safetensors")):
            raise ValueError(f"`source` {folder} has pickled weights only ({pickled[0].name}), which could run code: convert "
                             "them where you trust them (save_pretrained writes safetensors)")  # fmt: skip


def first_line(error: BaseException) -> str:
    """The first line of an error's message, within reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
