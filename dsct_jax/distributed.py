"""How the processes of one run on several machines find each other. Called once, before jax is asked for its devices."""

import os
from collections.abc import Mapping

import jax

from dsct_jax.errors import UserError

AUTO = "auto"


def cluster_of(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, as far as environment variables tell: all of them are set by the launcher, not by the user.

    Slurm's srun, Open MPI's mpirun, TPU pods (several workers or slices) and indexed jobs of Kubernetes; None for a process of its own.
    """

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 0

    if "SLURM_STEP_NODELIST" in environment and count("SLURM_NTASKS") > 1:
        return "Slurm"
    if count("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or count("MEGASCALE_NUM_SLICES") > 1:
        return "TPU pod"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def join_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of a run's several, if it is; on its own it does nothing.

    Args:
        coordinator: HOST:PORT that process 0 listens on, the same for all; AUTO: as jax finds out by itself; None: by itself where `cluster_of`
            sees a launcher.
        num_processes: how many there are.
        process_id: which of them this is, from 0.

    Raises:
        UserError: flags that do not fit together, or processes that do not find each other.
    """
    if coordinator is None or coordinator == AUTO:
        if not num_processes is process_id is None:
            raise UserError("--num_processes and --process_id need --coordinator=HOST:PORT, where process 0 listens")
        launcher = cluster_of(os.environ)
        if coordinator is None and launcher is None:
            return
        where, address = launcher or "this machine", None
    else:
        if num_processes is None or process_id is None:
            raise UserError(f"--coordinator={coordinator} needs --num_processes and --process_id as well")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} cannot be used: must be 0 to {num_processes - 1} (--num_processes={num_processes})")
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal()):
            raise UserError(f"--coordinator={coordinator} cannot be used: must be HOST:PORT, such as 10.0.0.1:8476, or {AUTO}")
        where = address = coordinator
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the processes of the run did not find each other ({where}): {reason}; see docs/training.md") from None
