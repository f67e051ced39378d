"""The sibling models that benchmarks.siblings has trained, as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fastsample
from benchmarks.sections.quality_rows import digest_of, load

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Sibling:
    """A model in the folder of its training."""

    folder: Path

    @property
    def name(self) -> str:
        """As in benchmarks.siblings."""
        return self.folder.name

    @property
    def digest(self) -> str:
        """The first letters of the SHA-256 of its weights."""
        return digest_of(self.folder / WEIGHTS)

    def load(self) -> fastsample.zoo.UNet:
        """The model, once a process."""
        return load(self.folder / WEIGHTS)
