"""The rendezvous variables of every launcher: torchrun, deepspeed, Open MPI, MPICH, srun, none."""

import os
import re

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.launch_environment import choose_accelerator, first_node, local_world_size, rank_in, rendezvous

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-4711@1",
    "PMIX_RANK": "2",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "9", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}
INTERACTIVE_SRUN_SHELL = {  # what commands in the shell of `srun --pty bash` inherit
    **SRUN,
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "gpu003",
}


def test_torchrun_and_deepspeed_variables_are_unchanged():
    assert rendezvous({**TORCHRUN, "OTHER": "x"}) == TORCHRUN


def test_torchrun_variables_take_precedence_over_other_launchers():
    assert rendezvous({**SRUN, **OPEN_MPI, **MPICH, **TORCHRUN}) == TORCHRUN


def test_srun_step_over_two_nodes():
    assert {**rendezvous(SRUN), "MASTER_PORT": ""} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "",
    }


def test_deepspeed_is_told_of_a_missing_accelerator(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("os.path.exists", lambda path: path == "/dev/nvidiactl")
    choose_accelerator()
    assert "DS_ACCELERATOR" not in os.environ
    monkeypatch.setattr("os.path.exists", lambda path: False)
    choose_accelerator()
    assert os.environ.pop("DS_ACCELERATOR") == "cpu"


def test_step_smaller_than_its_job_has_its_own_world_size():
    step = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    assert rendezvous(step)["WORLD_SIZE"] == "2"
    assert rendezvous(step)["MASTER_ADDR"] == "127.0.0.1"


def test_python_in_a_batch_script_is_a_world_of_one():
    """sbatch sets SLURM_PROCID, but only srun makes a step."""
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert rendezvous(batch)["WORLD_SIZE"] == "1"


def test_open_mpi_on_one_node():
    assert {**rendezvous(OPEN_MPI), "MASTER_PORT": ""} == {
        "RANK": "2",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "",
    }


def test_mpich_equals_open_mpi():
    assert {**rendezvous(MPICH), "MASTER_PORT": ""} == {**rendezvous(OPEN_MPI), "MASTER_PORT": ""}


@pytest.mark.parametrize("launcher", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_mpirun_in_an_interactive_srun_shell_is_one_world(launcher: dict[str, str]):
    """With Slurm's variables every rank would be a run of its own in the same folder."""
    assert rendezvous({**INTERACTIVE_SRUN_SHELL, **launcher}) == rendezvous(launcher)


def test_pmi_variables_of_srun_are_ignored():
    """`srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE, but no local rank."""
    assert rendezvous({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}) == rendezvous(SRUN)


def test_no_launcher_is_a_world_of_one():
    assert rendezvous({}) == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


@pytest.mark.parametrize("launcher", [SRUN, OPEN_MPI, MPICH, TORCHRUN], ids=["srun", "Open MPI", "MPICH", "torchrun"])
def test_master_address_and_port_in_the_environment_take_precedence(launcher: dict[str, str]):
    variables = rendezvous({**launcher, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    ("launcher", "rank", "job"),
    [(SRUN, "SLURM_PROCID", "SLURM_JOB_ID"), (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "PMIX_NAMESPACE")],
    ids=["srun", "Open MPI"],
)
def test_port_is_equal_within_a_job_and_differs_between_jobs(launcher: dict[str, str], rank: str, job: str):
    ports = [{rendezvous({**launcher, rank: str(r), job: j})["MASTER_PORT"] for r in range(8)} for j in "abcdefgh"]
    assert all(len(ports_of_job) == 1 for ports_of_job in ports)
    assert len(set.union(*ports)) == len(ports)
    assert all(1024 < int(port) < 65536 for port in set.union(*ports))


def test_requeued_job_uses_another_port():
    """Ranks of the previous attempt may still use the first one."""
    ports = {rendezvous({**SRUN, "SLURM_RESTART_COUNT": str(attempt)})["MASTER_PORT"] for attempt in range(4)}
    assert len(ports) == 4


@pytest.mark.parametrize("launcher", [SRUN, OPEN_MPI, MPICH], ids=["srun", "Open MPI", "MPICH"])
def test_all_five_variables_are_returned(launcher: dict[str, str]):
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    assert set(rendezvous(launcher)) == names


@pytest.mark.parametrize(
    ("launcher", "rank", "ranks_of_host"),
    [
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, 3, 2),
        ({**TORCHRUN, "LOCAL_SIZE": "2"}, 3, 2),  # deepspeed
        (OPEN_MPI, 2, 4),
        (MPICH, 2, 4),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 5, 4),
        ({}, 0, 1),
    ],
    ids=["torchrun", "deepspeed", "Open MPI", "MPICH", "srun", "none"],
)
def test_rank_and_local_world_size(launcher: dict[str, str], rank: int, ranks_of_host: int):
    assert rank_in(launcher) == rank
    assert local_world_size(launcher, default=1) == ranks_of_host


@pytest.mark.parametrize(("launcher", "size"), [(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), (MPICH, "PMI_SIZE")])
def test_mpi_job_over_several_nodes_without_address_raises(launcher: dict[str, str], size: str):
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is not set .*mpirun -x MASTER_ADDR=HOST"):
        rendezvous({**launcher, size: "8"})
    assert rendezvous({**launcher, size: "8", "MASTER_ADDR": "head"})["MASTER_ADDR"] == "head"


def test_empty_node_list_raises_with_the_variable_to_set():
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        rendezvous({**SRUN, "SLURM_STEP_NODELIST": ""})
    assert rendezvous({**SRUN, "SLURM_STEP_NODELIST": "", "MASTER_ADDR": "head"})["MASTER_ADDR"] == "head"


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("node7.cluster.org", "node7.cluster.org"),
        ("a1,b2", "a1"),
        ("gpu[003-010,012],login1", "gpu003"),
        ("gpu[8,10-12]", "gpu8"),
        ("gpu[1-2]-ib", "gpu1-ib"),
        ("gpu[1-2]-ib,x", "gpu1-ib"),
        ("login1,gpu[003-010]", "login1"),
        ("rack[0-63]_blade[0-41]", "rack0_blade0"),
        ("rack[00-63]_blade[07,09],x[1-2]", "rack00_blade07"),
        ("10.0.0.[5-6]", "10.0.0.5"),
    ],
)
def test_first_node(nodelist: str, first: str):
    assert first_node(nodelist) == first


@pytest.mark.parametrize("nodelist", ["", ",a", "[1-2]"])
def test_node_list_without_a_host_raises(nodelist: str):
    with pytest.raises(ConfigError, match=re.escape(repr(nodelist))):
        first_node(nodelist)
