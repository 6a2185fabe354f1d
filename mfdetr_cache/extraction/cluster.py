"""Where work is sent to."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where Ray runs, and how many tasks at a time.

    Attributes:
        address: Of a running cluster, ``auto`` for the one of this machine; None starts one here.
        workers: Tasks at a time; 0 for one per GPU, or one per two CPUs where there is none.
    """

    address: str | None = None
    workers: int = 0
