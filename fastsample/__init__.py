from fastsample.ops.backend import backends
