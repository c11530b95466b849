"""The processor cores of this machine, and the processes of a run that share them."""

import os


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes_on_this_machine(environment=os.environ) -> int:
    """How many processes of this run are on this machine, as Paddle's launcher has set it."""
    here = environment.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    endpoints = environment.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    same = sum(endpoint.rpartition(":")[0] == here for endpoint in endpoints) if here else 0
    return max(1, same)


def core_share(environment=os.environ) -> int:
    """The available cores, shared equally among the processes of the run on this machine."""
    return max(1, available_cores() // processes_on_this_machine(environment))
