"""A Slurm of one machine: slurmctld and slurmd as they come, in a folder and on ports of their own."""

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.experiments.experiment_jobs import wait_until

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=3
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")


def missing() -> list[str]:
    """The commands of Slurm that are not installed; Debian's packages are slurmctld, slurmd and slurm-client."""
    return [command for command in COMMANDS if shutil.which(command, path=_path()) is None]


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Four CPUs, without munge and accounting. Yields the environment in which its commands find it."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    settings = {
        "host": socket.gethostname().partition(".")[0],
        "user": getpass.getuser(),
        "folder": folder,
        "controller_port": _free_port(),
        "node_port": _free_port(),
    }
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    daemons = [
        subprocess.Popen([name, "-D"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in ("slurmctld", "slurmd")
    ]
    try:
        wait_until(lambda: ask(environment, "sinfo", "--noheader", "--format=%T") == "idle")
        yield environment
    finally:
        ask(environment, "scancel", f"--user={settings['user']}")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)


def ask(environment: dict[str, str], *command: str) -> str:
    """What a command of Slurm says; nothing when it fails."""
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin"])  # where Debian puts daemons, outside a user's PATH


def _free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
