"""What an installed wheel must do: have its CPU kernels, and sample digits. It runs outside the source tree."""

from __future__ import annotations

import fastsample
import fastsample.kernels


def main() -> None:
    """Samples with the bundled model, and says where the package lies."""
    assert fastsample.backends()["cpu"]["available"], fastsample.backends()
    images = fastsample.ddim(fastsample.zoo.digits(), (2, 1, 28, 28), steps=5)
    assert images.shape == (2, 1, 28, 28) and images.isfinite().all()
    print("the wheel samples:", fastsample.__version__, fastsample.__file__)


if __name__ == "__main__":
    main()
