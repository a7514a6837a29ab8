"""The files say what the library is: few at the top, the rest in folders that list what they hold."""

import ast
from pathlib import Path

import pytest

import quieten

ROOT = Path(quieten.__file__).parent
FOLDERS = sorted(
    path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("cli", "commands", "interop", "metrics")
)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_lists_its_files_in_their_own_words(folder):
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    rows = said.split("\n\n", 1)[1].splitlines()
    listed = " ".join(" ".join(rows).split())
    files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
    assert [row.split()[0] for row in rows if row[:1].strip()] == [file.stem for file in files]
    for file in files:
        first = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
        assert f"{file.stem} {' '.join(first.split())}" in listed
