"""Small models that benchmarks sample from."""
