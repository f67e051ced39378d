"""What every benchmark shares: clocks, options, results."""
