"""A CUDA device that is not there: its tensors say `cuda:0`, hold CPU memory, and mind what a GPU minds.

Tensors on it meet only their own kind; reading one on the host or copying between devices is counted, and refused where
a test says so, as a GPU that is captured refuses it. What runs in a capture is taped, and replayed without Python. The
tape keeps what the capture itself allocated, as a graph's pool does, and knows all else by address: a replay that finds
such memory freed fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastsample.loop import loop
from fastsample.ops import address, noise
from fastsample.ops import backend as backends
from fastsample.ops.backend import cpu_module
from fastsample.ops.noise import keys
from fastsample.ops.noise import launch as noise_launch
from fastsample.ops.step import launch as step_launch
from fastsample.tables import Table

_cpu = cpu_module()

CUDA = torch.device("cuda:0")
# What a GPU cannot answer without waiting for all work before it: a value, or a size that depends on values.
_READS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique", "_unique2"}
_COPIES = {"copy_", "_to_copy", "_copy_from", "to"}


class HostSyncError(AssertionError):
    """The host would wait for the device, or send it something, in the middle of a loop."""


class Place:
    """Where a tensor lies, without keeping its memory."""

    def __init__(self, host: Tensor) -> None:
        self._storage = StorageWeakRef(host.untyped_storage())
        self._dtype, self._layout = host.dtype, (host.storage_offset(), host.size(), host.stride())

    def check(self) -> None:
        """Raises where a replay would touch memory that is another's by now."""
        assert not self._storage.expired(), "a replay uses memory from before the capture that was freed since"

    def tensor(self) -> Tensor:
        self.check()
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)


class Pretended(Tensor):
    """A tensor on the device: `host` is the memory it stands for."""

    host: Tensor
    lent: ClassVar[dict[int, Place]] = {}  # what lies at the addresses that were asked for

    @staticmethod
    def __new__(cls, host: Tensor) -> Pretended:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            dtype=host.dtype,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            device="meta",  # torch's own code would ask for the driver of a cuda device
        )
        wrapper.host = host
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the pretended device's mode")

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        address = self.host.data_ptr()
        self.lent[address] = Place(self.host)
        return address

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.host})"


class Device(TorchDispatchMode):
    """Under it `device="cuda"` makes tensors of this device.

    Attributes:
        strict: whether syncs and uploads raise HostSyncError.
        syncs: the names of those there have been.
        tape: where what runs on the device is traced, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # only such a mode may make tensors of absent devices
        self.strict = False
        self.syncs: list[str] = []
        self.tape: list[Callable[[], None]] | None = None

    def __enter__(self) -> Device:
        torch._C._ensureCUDADeviceGuardSet()
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """In it, what makes the host and the device wait for one another raises."""
        self.strict = True
        try:
            yield
        finally:
            self.strict = False

    def launch(self, kernel: Callable[[], None], addresses: Iterable[int]) -> None:
        """Runs a kernel that this mode does not see itself, with these addresses among its arguments."""
        kernel()
        if self.tape is None:
            return
        places = [Pretended.lent[one] for one in addresses if one in Pretended.lent]

        def again() -> None:
            for place in places:
                place.check()
            kernel()

        self.tape.append(again)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        wanted = kwargs.get("device")
        to_us = torch.device(wanted).type in ("cuda", "meta") if wanted is not None else bool(ours)
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if not ours and not to_us:
            return func(*args, **kwargs)
        self._mind(func, args, tensors, ours, to_us)
        wrappers = {id(tensor.host): tensor for tensor in ours}
        inner, inner_kwargs = tree_map(_host, args), tree_map(_host, kwargs)
        # Shapes as they are now: there are operations that change them in place.
        frozen = tree_map(_frozen, (args, kwargs)) if self.tape is not None else None
        if func._schema.name == "aten::_to_copy" and len(ours) != int(to_us):
            result = func(*inner, **inner_kwargs).clone()  # the other device's memory is another
        else:
            result = func(*inner, **inner_kwargs)
        if frozen is not None:
            self._record(func, frozen, {_storage(tensor.host) for tensor in ours}, result)

        memory = {_storage(tensor.host) for tensor in ours}

        def wrapped(one: Any) -> Any:
            if not isinstance(one, Tensor) or not to_us:
                return one
            if id(one) in wrappers:
                return wrappers[id(one)]
            # Views of ordinary tensors are ordinary in inference mode too.
            with torch.inference_mode(torch.is_inference_mode_enabled() and _storage(one) not in memory):
                return Pretended(one)

        return tree_map(wrapped, result)

    def _mind(self, func: Any, args: Any, tensors: list[Tensor], ours: list[Pretended], to_us: bool) -> None:
        name = func._schema.name.removeprefix("aten::")
        crosses = False
        if name in _COPIES:
            crosses = len(ours) != len(tensors) or (bool(ours) != to_us)
        elif any(not isinstance(tensor, Pretended) and tensor.ndim > 0 for tensor in tensors):
            raise HostSyncError(f"{name} of tensors on different devices")
        by_mask = name.startswith(("index", "_index_put")) and any(
            one.dtype in (torch.bool, torch.uint8) for one in ours[1:]
        )
        if (ours and name in _READS) or crosses or by_mask:
            self.syncs.append(name)
            if self.strict:
                raise HostSyncError(f"{name} makes the host wait for the device, or sends it something")

    def _record(self, func: Any, frozen: Any, given: set[int], result: Any) -> None:
        assert self.tape is not None
        results = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        made = [None if _storage(one) in given else _alias(one) for one in results]

        def again() -> None:
            args, kwargs = tree_map(_thawed, frozen)
            results = [one for one in tree_leaves(func(*args, **kwargs)) if isinstance(one, Tensor)]
            for old, new in zip(made, results, strict=True):
                if old is not None:
                    old.copy_(new)

        self.tape.append(again)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, Pretended) else value


def _frozen(value: Any) -> Any:
    return Place(value.host) if isinstance(value, Pretended) else _alias(value)


def _thawed(value: Any) -> Any:
    return value.tensor() if isinstance(value, Place) else _alias(value)


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _to_meta(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def named(value: Any) -> Any:
        return "meta" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value

    def converted(*args: Any, **kwargs: Any) -> Tensor:
        return function(*map(named, args), **{name: named(value) for name, value in kwargs.items()})

    return converted


class Kernels:
    """What stands for fastsample._cuda there: the CPU's kernels, on the memory that the device's addresses name."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def driver(self) -> str:
        return ""

    def architectures(self) -> list[str]:
        return []

    def step_workspace(self, batch: int, size: int, rescale: bool, thresholds: bool) -> int:
        return 0

    def log_prob_parts(self, batch: int, size: int) -> int:
        parts: int = _cpu.log_prob_parts(batch, size)
        return parts

    def Step(self, *, row_count: int, workspace: int, device: int, guidance: int, **fixed: Any) -> Any:
        kernel = _cpu.Step(guidance=guidance, one_guidance=False, **fixed)
        kept = (guidance, *fixed.values())

        def launch(*arguments: Any) -> None:
            *given, _stream = arguments
            self._device.launch(lambda: kernel(*given, 1), (*kept, *given))

        return launch

    def randn(
        self, out: int, batch: int, size: int, keys: int, step: int, stream_id: int, stream: int, device: int
    ) -> None:
        self._device.launch(lambda: _cpu.randn(out, batch, size, keys, step, stream_id, 1), (out, keys))


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> Iterator[Device]:
    """The device, with kernels of its own or without, where the reference runs on it."""
    device = Device()
    Pretended.lent.clear()
    module = Kernels(device) if kernels else None

    def runs_on(name: str, where: torch.device) -> bool:
        return name == "cpu" if where.type == "cpu" else name == "cuda" and kernels

    def rows(table: Table, where: torch.device) -> Tensor:
        return Pretended(torch.from_numpy(table.packed.copy()))

    monkeypatch.setattr(backends, "_cuda", module)
    monkeypatch.setattr(backends, "_runs_on", runs_on)
    monkeypatch.setattr(step_launch, "packed_rows", rows)
    monkeypatch.setattr(step_launch, "_stream_of", lambda where: lambda: 0)
    for one in (step_launch, noise_launch):
        monkeypatch.setattr(one, "place", lambda where: (0, 0))
    # Underneath, tensors of the device are "meta": conversions to cuda would ask for its driver.
    for owner, name in ((torch.Tensor, "to"), (torch, "as_tensor")):
        monkeypatch.setattr(owner, name, _to_meta(getattr(owner, name)))
    # The registered ops are for those who look at a program; this mode is a device that runs one.
    for one in (keys, noise):
        monkeypatch.setattr(one, "traced", lambda *tensors: False)
    monkeypatch.setattr(loop, "recording", lambda: False)
    monkeypatch.setattr(address, "start_of", lambda tensor: tensor.data_ptr())
    with device:
        yield device
