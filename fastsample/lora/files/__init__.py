"""LoRA files: read, their layers found by name, refused where they are odd."""
