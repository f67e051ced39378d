"""What is measured: methods, their steps, projections with low-rank adapters."""
