"""Layers with frozen weights and adapters beside them."""
