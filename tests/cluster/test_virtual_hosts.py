"""The ground that the other tests of this folder stand on: hosts with networks of their own, and SLURM over them."""

from tests.cluster.virtual_hosts import Slurm


def test_a_job_runs_on_two_hosts_and_a_dead_one_comes_back(slurm: Slurm) -> None:
    names = slurm.run("srun", "-N2", "--ntasks-per-node=1", "hostname")
    assert sorted(names.stdout.split()) == ["node1", "node2"], names.stdout
    hosts = slurm.hosts
    assert hosts.run("head", "pdsh", "-N", "-w", "node2", "hostname").stdout.split() == ["node2"]

    hosts.kill("node2")
    assert hosts.run("node1", "ssh", "node2", "true").returncode == 255
    slurm.revive()
    again = slurm.run("srun", "-N2", "--ntasks-per-node=1", "hostname")
    assert sorted(again.stdout.split()) == ["node1", "node2"], again.stdout
