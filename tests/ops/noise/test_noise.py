"""ops.randn: known answers, the same bits everywhere, and the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsample.ops import randn
from fastsample.ops.backend import cpu_module
from fastsample.ops.noise.reference import philox_reference
from support.levels import LEVELS, at_level, needs_cpu, on_threads
from support.philox import KNOWN_ANSWERS
from support.splitmix import key

_cpu = cpu_module()

SIZES = [1, 2, 3, 4, 5, 63, 64, 65, 111, 112, 2047, 2048, 2049, 4099, 16384]


def numpy_philox(j: np.ndarray, step: int, stream: int, key: int) -> list[np.ndarray]:
    """An independent statement in uint64 NumPy."""
    low = np.uint64(0xFFFFFFFF)
    c = [j.astype(np.uint64) & low, j.astype(np.uint64) >> np.uint64(32)]
    c += [np.full(j.shape, step, np.uint64), np.full(j.shape, stream, np.uint64)]
    k = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def exact_normals(size: int, key: int, step: int, stream: int) -> np.ndarray:
    """Box-Muller of the Philox words in float64; u is rounded to float32, as the definition in float32 has it."""
    words = numpy_philox(np.arange(-(-size // 4)), step, stream, key)
    normals = []
    for x, y in (words[:2], words[2:]):
        u = ((x >> np.uint64(8)) * 2.0**-24 + 2.0**-25).astype(np.float32).astype(np.float64)
        radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * ((y >> np.uint64(8)) * 2.0**-24)
        normals += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(normals, axis=1).reshape(-1)[:size]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers_reference(counter: tuple, key: tuple, expected: tuple) -> None:
    words = philox_reference([torch.tensor([c]) for c in counter], torch.tensor([key[0]]), torch.tensor([key[1]]))
    assert tuple(word.item() for word in words) == expected


@needs_cpu
@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers_cpu(level: str, counter: tuple, key: tuple, expected: tuple) -> None:
    assert tuple(_cpu.philox(counter, key)) == expected


@pytest.mark.parametrize("size", SIZES)
def test_same_bits_on_every_level_and_within_1_ulp_of_the_reference(backend: str, size: int) -> None:
    got = randn((3, size), seed=123, step=7, stream=1, backend=backend).numpy()
    want = randn((3, size), seed=123, step=7, stream=1, backend="reference").numpy()
    np.testing.assert_array_max_ulp(got, want, maxulp=1)
    if backend == "cpu":
        with at_level("scalar"):
            scalar = randn((3, size), seed=123, step=7, stream=1, backend="cpu").numpy()
        assert got.tobytes() == scalar.tobytes()


def test_error_against_the_exact_formula_is_below_3_ulp(backend: str) -> None:
    size = 200_001
    got = randn((1, size), seed=99, step=3, stream=2, backend=backend)[0].numpy()
    exact = exact_normals(size, key(99, 0), 3, 2)
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    # Where cosine or sine is 0 the product is too: an ulp of 0 is not a measure.
    counts = np.abs(exact) > 1e-30
    assert (np.abs(got - exact)[counts] / ulp[counts]).max() < 3
    assert np.abs(got[~counts]).max(initial=0) < 1e-6


@pytest.mark.parametrize("size", [1, 5, 20, 100, 4100, 9999])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batch_place_and_threads_do_not_matter(size: int, threads: int) -> None:
    with on_threads(threads):
        together = randn((37, size), seed=1000)
        alone = [randn((1, size), seed=1000, index=i) for i in range(37)]
    assert torch.equal(together, torch.cat(alone))


def test_a_prefix_does_not_depend_on_the_sample_size() -> None:
    assert torch.equal(randn((1, 5003), seed=4)[:, :1001], randn((1, 1001), seed=4))


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, 2**64 + 5], ids=str)
def test_seeds_count_modulo_2_64(backend: str, seed: int) -> None:
    both = randn((2, 9), seed=seed, backend=backend)
    for i in range(2):
        exact = exact_normals(9, key(seed, i), 0, 0)
        np.testing.assert_allclose(both[i].numpy(), exact, rtol=4e-7)


@needs_cpu
@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_counter_carries_into_its_second_word(level: str) -> None:
    # Straddling 4 * 2^32 elements without 64 GiB: start the kernel there.
    first = 4 * 2**32 - 256
    words = numpy_philox(np.arange(first // 4, first // 4 + 128), 5, 1, 77)
    u = ((words[0] >> np.uint64(8)) * 2.0**-24 + 2.0**-25).astype(np.float32).astype(np.float64)
    expected = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * (words[1] >> np.uint64(8)) * 2.0**-24)
    out = torch.full((512,), float("nan"))
    _cpu.normals(out.data_ptr(), first, 512, 77, 5, 1)
    np.testing.assert_allclose(out[::4].numpy(), expected, rtol=4e-7, atol=1e-12)


def test_step_stream_and_seed_each_give_other_noise() -> None:
    variants = [
        randn((1, 64), seed=1),
        randn((1, 64), seed=2),
        randn((1, 64), seed=1 << 32),
        randn((1, 64), seed=1, step=1),
        randn((1, 64), seed=1, stream=1),
    ]
    for i, a in enumerate(variants):
        for b in variants[:i]:
            assert (a != b).sum() > 60


@pytest.mark.parametrize("shape", [(2, 3, 5), (1,), (4, 1, 1), (2, 16, 7)], ids=str)
def test_out_is_filled_and_returned(backend: str, shape: tuple[int, ...]) -> None:
    out = torch.full(shape, float("nan"))
    assert randn(shape, seed=3, out=out, backend=backend) is out
    assert torch.equal(out, randn(shape, seed=3, backend=backend))


def test_strided_out_gets_logical_order(backend: str) -> None:
    out = torch.full((2, 8, 6, 3), float("nan")).permute(0, 3, 1, 2)
    randn((2, 3, 8, 6), seed=3, out=out, backend=backend)
    assert torch.equal(out, randn((2, 3, 8, 6), seed=3, backend=backend))


@pytest.mark.parametrize(
    "seeds", [[5, 9], (5, 9), torch.tensor([5, 9]), torch.tensor([5, 9], dtype=torch.int32), np.array([5, 9])], ids=repr
)
def test_a_seed_per_sample(seeds: object) -> None:
    got = randn((2, 10), seed=seeds)  # type: ignore[arg-type]
    assert torch.equal(got, torch.cat([randn((1, 10), seed=5), randn((1, 10), seed=9)]))


def test_moments_and_neighbours_of_a_million() -> None:
    z = randn((10, 100_000), seed=0).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for lag in (1, 2, 3, 4):
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 4 / n**0.5
    assert abs((z[1:] * z[:-1]).mean()) < 4 / (0.9 * n) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"shape": ()}, ValueError, "first axis", id="no-axis"),
        pytest.param({"shape": (2, 0)}, ValueError, "no zero", id="zero-size"),
        pytest.param({"shape": (0, 2)}, ValueError, "no zero", id="no-samples"),
        pytest.param({"seed": [1]}, ValueError, "one per sample", id="too-few-seeds"),
        pytest.param({"seed": 1.5}, TypeError, "seed must be", id="float-seed"),
        pytest.param({"seed": torch.tensor([1.0, 2.0])}, TypeError, "integers", id="float-seed-tensor"),
        pytest.param({"step": -1}, ValueError, "step", id="negative-step"),
        pytest.param({"stream": 2**32}, ValueError, "stream", id="huge-stream"),
        pytest.param({"out": torch.zeros(2, 2)}, ValueError, "shape", id="out-shape"),
        pytest.param({"out": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "float32", id="out-dtype"),
        pytest.param({"out": torch.zeros(2, 3, device="meta"), "device": "cpu"}, ValueError, "lies on", id="devices"),
        pytest.param({"backend": "cuda"}, ValueError, "cannot run here", id="absent-backend"),
        pytest.param({"backend": "fast"}, ValueError, "must be one of", id="unknown-backend"),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        randn(**{"shape": (2, 3), "seed": 0, **arguments})
