"""Batches from a folder of .npz files: arrays by input name, a file for each batch."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import numpy as np

from depgraph.errors import DataError


class NpzFolder:
    """The .npz files of a folder, in the order of their names, as dicts of arrays; each is read when its turn comes.

    It can be gone through any number of times. Raises DataError, at once, where the folder has no such file; then for one
    that can't be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.files = sorted(Path(folder).glob("*.npz"))
        if not self.files:
            raise DataError(f"{folder} has no .npz files: give a folder with one for each batch, arrays by input name")

    def __getitem__(self, which: slice) -> NpzFolder:
        """Some of them, by their order."""
        some = copy(self)
        some.files = self.files[which]
        return some

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for file in self.files:
            try:
                with np.load(file) as held:
                    batch = {name: held[name] for name in held.files}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise DataError(f"{file} can't be read as .npz: {' '.join(str(error).split())[:200]}") from error
            yield batch

    def __len__(self) -> int:
        return len(self.files)
