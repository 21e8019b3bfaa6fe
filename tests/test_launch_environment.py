"""The same five variables come out of every launcher's own."""

from __future__ import annotations

import re

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.launch_environment import RENDEZVOUS, first_node, rendezvous

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
INTERACTIVE_SRUN_SHELL = {  # what `srun --pty bash` puts into the environment of all that is typed there
    **SRUN,
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "gpu003",
}


def test_variables_of_torchrun_and_deepspeed_are_taken_as_they_are():
    assert rendezvous({**TORCHRUN, "OTHER": "x"}) == TORCHRUN


def test_variables_that_are_set_win_over_every_other_launcher():
    assert rendezvous({**SRUN, **OPEN_MPI, **MPICH, **TORCHRUN}) == TORCHRUN


def test_srun():
    found = rendezvous(SRUN)
    assert {**found, "MASTER_PORT": ""} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "",
    }


def test_a_step_smaller_than_its_job_is_a_world_of_its_own_size():
    step = {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    assert rendezvous(step)["WORLD_SIZE"] == "2"
    assert rendezvous(step)["MASTER_ADDR"] == "127.0.0.1"


def test_a_batch_script_that_starts_python_itself_is_a_world_of_one():
    """sbatch sets SLURM_PROCID, but only srun makes a step."""
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert rendezvous(batch)["WORLD_SIZE"] == "1"


def test_open_mpi():
    found = rendezvous(OPEN_MPI)
    assert {**found, "MASTER_PORT": ""} == {
        "RANK": "2",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "",
    }


def test_mpich_agrees_with_open_mpi():
    assert {**rendezvous(MPICH), "MASTER_PORT": ""} == {**rendezvous(OPEN_MPI), "MASTER_PORT": ""}


@pytest.mark.parametrize("launcher", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_mpirun_typed_into_an_interactive_srun_shell_is_one_world(launcher: dict[str, str]):
    """Taking Slurm's variables there would make every rank a run of its own in the same folder."""
    assert rendezvous({**INTERACTIVE_SRUN_SHELL, **launcher}) == rendezvous(launcher)


def test_pmi_variables_set_by_srun_do_not_hide_slurms_own():
    """`srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE, but no local rank."""
    assert rendezvous({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}) == rendezvous(SRUN)


def test_nothing_is_a_world_of_one():
    assert rendezvous({}) == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


@pytest.mark.parametrize("launcher", [SRUN, OPEN_MPI, MPICH, TORCHRUN], ids=["srun", "Open MPI", "MPICH", "torchrun"])
def test_master_address_and_port_in_the_environment_win(launcher: dict[str, str]):
    found = rendezvous({**launcher, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    ("launcher", "rank", "job"),
    [(SRUN, "SLURM_PROCID", "SLURM_JOB_ID"), (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "PMIX_NAMESPACE")],
    ids=["srun", "Open MPI"],
)
def test_ranks_of_a_job_derive_one_port_and_other_jobs_another(launcher: dict[str, str], rank: str, job: str):
    ports = [{rendezvous({**launcher, rank: str(r), job: j})["MASTER_PORT"] for r in range(8)} for j in "abcdefgh"]
    assert all(len(of_job) == 1 for of_job in ports)
    assert len(set.union(*ports)) == len(ports)
    assert all(1024 < int(port) < 65536 for port in set.union(*ports))


def test_a_requeued_job_takes_another_port():
    """Ranks of the old life may still hold the first one."""
    ports = {rendezvous({**SRUN, "SLURM_RESTART_COUNT": str(attempt)})["MASTER_PORT"] for attempt in range(4)}
    assert len(ports) == 4


@pytest.mark.parametrize("launcher", [SRUN, OPEN_MPI, MPICH], ids=["srun", "Open MPI", "MPICH"])
def test_all_five_variables_come_out(launcher: dict[str, str]):
    assert set(rendezvous(launcher)) == set(RENDEZVOUS)


@pytest.mark.parametrize(("launcher", "size"), [(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), (MPICH, "PMI_SIZE")])
def test_an_mpi_job_over_several_nodes_needs_the_first_ones_address(launcher: dict[str, str], size: str):
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is not set .*mpirun -x MASTER_ADDR=HOST"):
        rendezvous({**launcher, size: "8"})
    assert rendezvous({**launcher, size: "8", "MASTER_ADDR": "head"})["MASTER_ADDR"] == "head"


def test_a_node_list_that_names_no_host_says_what_to_set():
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
def test_first_node_of_a_list(nodelist: str, first: str):
    assert first_node(nodelist) == first


@pytest.mark.parametrize("nodelist", ["", ",a", "[1-2]"])
def test_a_list_without_a_host_is_refused(nodelist: str):
    with pytest.raises(ConfigError, match=re.escape(repr(nodelist))):
        first_node(nodelist)
