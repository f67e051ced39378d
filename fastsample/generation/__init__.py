"""Sets of many samples, by one process or many: drawn in chunks, written so that nothing is lost, read as a stream."""

from fastsample.generation.chunk import Chunk
from fastsample.generation.folder import Folder
from fastsample.generation.merge import Report, merge, verify
from fastsample.generation.named import FORMS, named_model
from fastsample.generation.recipe import Recipe
from fastsample.generation.run import generate

__all__ = ["FORMS", "Chunk", "Folder", "Recipe", "Report", "generate", "merge", "named_model", "verify"]
