"""What users are told of the backends."""

from __future__ import annotations

from typing import Any

from fastsample.ops import backend
from fastsample.ops.lora.choice import choices


def backends() -> dict[str, dict[str, Any]]:
    """What can run here, and why the rest cannot.

    Returns:
        For each of "reference", "cpu", "triton" and "cuda" a dict with "available" (bool) and "reason" (empty where
        available). "cpu" also tells "isa", the instruction set in use, "isas", those that this CPU and build have,
        "threads", the thread runtime, "lora", which of the isas lora_linear uses for each dtype, or "torch" where torch
        multiplies faster than all of them (measured at the first question or the first weights, in 20 to 60 ms), and
        "amx", the reason where AMX is not among the isas, else empty; "triton" tells "interpreted", whether its kernels
        run in Triton's interpreter (TRITON_INTERPRET=1), slowly and on CPU tensors too; "cuda" tells "architectures",
        what it was compiled for.

    Example:
        >>> backends()["reference"]["available"]
        True
    """
    cpu, cuda, why_not = backend.cpu_module(), backend.cuda_module(), backend.reasons()
    status: dict[str, dict[str, Any]] = {
        name: {"available": not reason, "reason": reason} for name, reason in why_not.items()
    }
    if cpu is not None:
        status["cpu"].update(isa=cpu.isa(), isas=cpu.available_isas(), threads=cpu.thread_runtime())
        status["cpu"].update(lora=choices(), amx=cpu.why_no_amx())
    status["triton"]["interpreted"] = not why_not["triton"] and backend.interpreted()
    status["cuda"]["architectures"] = [] if cuda is None else cuda.architectures()
    return status
