"""The callable that submitit pickles and each rank runs: process group, stop flag, requeue. No model or data code."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tdkd_dist.config import Config
from tdkd_dist.files import private_folder
from tdkd_dist.memory import keep_freed_memory
from tdkd_dist.mistakes import Mistake
from tdkd_dist.run.heartbeat import Heartbeat, outlasting

PACKAGE = Path(__file__).resolve().parent.parent
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
}
"""Variables that say where compiled code is kept; some defaults are in the home folder, which clusters share slowly."""

PREEMPTED_FILE = "TDKD_PREEMPTED"
"""Variable that names the file by which rank 0 tells the batch script that the job ends for no fault of its own."""


@dataclass
class Outcome:
    """How a rank ended: `finished`, `stopped` (resumable, on request) or `refused` (a user's mistake, in `message`)."""

    state: Literal["finished", "stopped", "refused"]
    message: str = ""


@dataclass
class Job:
    """One run, to be called on every rank; it resumes from the run folder's newest checkpoint, if there is one."""

    config: Config
    teacher_weights: str | None = None

    def __call__(self) -> Outcome:
        """Join the other ranks and run. A crash is raised; submitit records its traceback."""
        flags = _SignalFlags()
        keep_caches_local()
        environment = _export_environment(self.config)
        from tdkd_dist import distributed

        try:
            finished = self._run(environment, flags)
        except Mistake as error:
            return Outcome("refused", str(error))
        finally:
            distributed.stop()
        if not finished and flags.preempted:
            flags.requeue(environment)
        elif not finished and flags.ended and environment.cluster == "slurm":
            # The batch script requeues a job that failed; one whose batch script was ended as well is cancelled.
            raise RuntimeError("Slurm ended this step (SIGTERM); the same command goes on from its last checkpoint")
        return Outcome("finished" if finished else "stopped")

    def checkpoint(self) -> Any:
        """What submitit runs again after preemption: the same job, since all its state is in the run folder."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _run(self, environment: Any, flags: "_SignalFlags") -> bool:
        import torch

        from tdkd_dist import distributed
        from tdkd_dist.run.folder import RunFolder
        from tdkd_dist.training.rank import Place
        from tdkd_dist.training.trainer import run

        device = _device(self.config, environment.local_rank)
        folder = RunFolder(self.config.run.folder.absolute())
        timeout_s = 60 * self.config.launcher.hang_timeout_min
        with Heartbeat(folder.heartbeat, rank=environment.rank, timeout_s=timeout_s) as heartbeat:
            heartbeat.beat("joining the other ranks", 0)
            distributed.start(device, outlasting(timeout_s))
            cores = distributed.cores_per_rank()
            torch.set_num_threads(cores)
            place = Place(
                device=device,
                rank=environment.rank,
                world_size=environment.world_size,
                workers=self.config.data.workers or cores,
                teacher_weights=self.teacher_weights,
            )
            return run(self.config, folder, place, heartbeat, lambda: flags.stop)


class _SignalFlags:
    """Signals only set flags; the training loop agrees on them at step boundaries, so that all ranks save together.

    USR2 is a preemption or the time limit near (submitit's signal): save and requeue. INT is the user's wish: save and
    stop. So is TERM on this machine; on Slurm it is Slurm's, for instance because a node did not answer for a while.
    """

    def __init__(self) -> None:
        self.stop = self.preempted = self.ended = False
        self._submitit_handler = signal.getsignal(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, self._set)
        signal.signal(signal.SIGTERM, self._set)
        signal.signal(signal.SIGINT, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
        self.preempted |= number == signal.SIGUSR2
        self.ended |= number == signal.SIGTERM

    def requeue(self, environment: Any) -> None:
        """Let submitit requeue the job from rank 0; the scheduler then ends the others."""
        if environment.rank == 0:
            assert callable(self._submitit_handler)
            if PREEMPTED_FILE in os.environ:
                Path(os.environ[PREEMPTED_FILE]).touch()
            self._submitit_handler(signal.SIGUSR2, None)
        elif environment.cluster == "slurm":
            time.sleep(300)


def keep_caches_local() -> None:
    """Keep compiled code in a folder of this user's on the node's own disk, unless the environment says otherwise."""
    caches = private_folder()
    if caches is None:
        return  # what is loaded from there is run: not from a folder that somebody else made
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(caches / name))


def _export_environment(config: Config) -> Any:
    """Set RANK, WORLD_SIZE and the rest from submitit's environment, and keep model hubs offline."""
    import submitit

    if config.launcher.network_interface is not None:
        os.environ["NCCL_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = config.launcher.network_interface
    elif config.launcher.nodes == 1:
        # The host's own name need not resolve on a laptop.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environment = submitit.helpers.TorchDistributedEnvironment()
    if config.launcher.nodes == 1:
        environment.master_addr = "127.0.0.1"
    environment.export(set_cuda_visible_devices=False, overwrite=True)
    environment.cluster = submitit.JobEnvironment().cluster
    os.environ["HF_HUB_OFFLINE"] = "1"
    return environment


def _device(config: Config, local_rank: int) -> Any:
    import torch

    if config.launcher.gpus_per_node == 0:
        keep_freed_memory()
        return torch.device("cpu")
    available = torch.cuda.device_count()
    if local_rank >= available:
        raise Mistake(
            f"launcher.gpus_per_node={config.launcher.gpus_per_node}: rank {local_rank} of this node sees {available}"
            " GPUs, and every rank must see all of them: on Slurm leave --gpus-per-task and --gpu-bind out of"
            " launcher.sbatch and launcher.srun_args; launcher.gpus_per_node=0 trains on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
