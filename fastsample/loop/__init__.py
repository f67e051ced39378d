"""The one loop: a model, a table, and what a run of them takes."""
