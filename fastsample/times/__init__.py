"""Which times and noise levels a run visits."""
