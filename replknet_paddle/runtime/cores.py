"""The processor cores of this machine, and the processes of a run that share them."""

import functools
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The entries of Linux's first processor; empty elsewhere."""
    if not CPUINFO.exists():
        return {}
    first = CPUINFO.read_text(errors="replace").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor_name() -> str:
    """The model of the processor; elsewhere than on Linux, its architecture."""
    return _cpuinfo().get("model name") or platform.machine()


def processor_has(flag: str) -> bool:
    """Whether the processor has a feature by its name in /proc/cpuinfo; elsewhere, False."""
    return flag in _cpuinfo().get("flags", "").split()


def processes_on_this_machine(environment=os.environ) -> int:
    """How many processes of this run are on this machine, as Paddle's launcher has set it."""
    here = environment.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    endpoints = environment.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    same = sum(endpoint.rpartition(":")[0] == here for endpoint in endpoints) if here else 0
    return max(1, same)


def core_share(environment=os.environ) -> int:
    """The available cores, shared equally among the processes of the run on this machine."""
    return max(1, available_cores() // processes_on_this_machine(environment))


def onednn_may_use_bfloat16(environment=os.environ) -> bool:
    """Whether ONEDNN_MAX_CPU_ISA leaves bfloat16 to oneDNN, where the processor has it."""
    largest = environment.get("ONEDNN_MAX_CPU_ISA", "").upper()
    is_avx512_without = largest in ("AVX512_CORE", "AVX512_CORE_VNNI")
    return not (is_avx512_without or largest.startswith(("SSE", "AVX2")) or largest == "AVX")
