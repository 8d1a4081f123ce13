"""`orpo-ds preflight`: is every host fit for this run? Asked before the start, because one bad host hangs them all.

    orpo-ds preflight --config run.yaml                        this host's report, as JSON
    orpo-ds preflight --hostfile HOSTS --config run.yaml       all hosts, compared; status 1 if one is unfit
    orpo-ds preflight --slurm --config run.yaml                the same for the hosts of this SLURM job

An agent runs on each host (`preflight_agent.py`). The questions get harder one by one: what are you, can you reach the
others, how fast, and does an all-reduce get through. What fails ends it there, since later answers would only say that
somebody waits for somebody.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo_ds.cluster import slurm
from orpo_ds.cluster.hostfile import read_hostfile
from orpo_ds.cluster.preflight_allreduce import Reduction
from orpo_ds.cluster.preflight_compare import (
    GIB,
    MIB,
    Finding,
    Limits,
    clock_findings,
    compare,
    gbit,
    link_findings,
    reach_findings,
    reduction_findings,
)
from orpo_ds.cluster.preflight_host import HostReport, Request, describe_host
from orpo_ds.cluster.transport import Agents, Answer, Host, over_srun, over_ssh

# What a run writes: looked at for free space, and not compared.
FOLDERS = ("output_dir", "dataset_cache_dir", "logging_dir")
CONFIG = "config"
THINGS = (
    "python",
    "code",
    "packages",
    "files",
    "gpus",
    "clock",
    "disk",
    "shared memory",
    "network",
    "all-reduce",
)


def main(words: Sequence[str]) -> None:
    """Parse the command line; print the report of this host, or the comparison of all."""
    options, rest = parser().parse_known_args(list(words))
    if options.hostfile is None and not options.slurm:
        print(json.dumps(describe_host(request_of(rest)).to_json(), indent=2))
        return
    hosts = over_srun(slurm_slots()) if options.slurm else over_ssh(read_hostfile(options.hostfile))
    if not check_hosts(hosts, words=rest, limits=limits_of(options)):
        raise SystemExit(1)


def check_hosts(hosts: Sequence[Host], *, words: Sequence[str], limits: Limits) -> bool:
    """Check all hosts, print a table and what is wrong, and say whether the run may start.

    Args:
        hosts: with the way to each of them (`transport.over_ssh`, `transport.over_srun`).
        words: `--config FILE` and flags of the run.
        limits: what each host must have.

    Raises:
        ValueError: the config cannot be read.
    """
    check = Check(hosts, limits)
    with Agents(hosts) as agents:
        check.run(agents, request_of(words))
    findings = [finding for finding in check.findings if finding.thing not in limits.skip]
    print(check.table(), file=sys.stderr)
    for finding in findings:
        print(f"orpo-ds preflight: {finding}", file=sys.stderr)
    verdict = f"{len(findings)} findings: not started" if findings else f"{len(hosts)} hosts are fit"
    print(f"orpo-ds preflight: {verdict}", file=sys.stderr, flush=True)
    return not findings


class Check:
    """The questions, in order, and what they showed."""

    def __init__(self, hosts: Sequence[Host], limits: Limits) -> None:
        self.hosts = list(hosts)
        self.limits = limits
        self.reports: dict[str, HostReport] = {}
        self.skews: dict[str, float] = {}
        self.rates: dict[tuple[str, str], float] = {}
        self.reductions: dict[str, Reduction] = {}
        self.findings: list[Finding] = []

    def run(self, agents: Agents, request: Request) -> None:
        """Ask until a question fails that the next one builds on."""
        self.describe(agents, request)
        if (
            len(self.reports) == len(self.hosts) > 1
            and "network" not in self.limits.skip
            and self.reach(agents)
        ):
            self.measure_links(agents)
            self.reduce(agents)

    def describe(self, agents: Agents, request: Request) -> None:
        """What each host is: one that does not answer is a finding and does not keep the others waiting."""
        question = {"do": "describe", **vars(request)}
        answers = self._answers(agents.ask_all(question, timeout_s=self.limits.time_limit_s), "start")
        for name, answer in answers.items():
            self.reports[name] = HostReport.from_json(answer.value)
            # The answer takes a moment to get here, so a clock that is right seems a little behind.
            self.skews[name] = self.reports[name].clock - answer.received
        slots = {host.name: host.slots for host in self.hosts}
        self.findings += compare(
            self.reports, starter=describe_host(request), slots=slots, limits=self.limits
        )
        self.findings += clock_findings(self.skews, self.limits)

    def reach(self, agents: Agents) -> bool:
        """Whether all hosts reach each other, and the first one's master port."""
        names = [host.name for host in self.hosts]
        first = names[0]
        ports = {name: [0, self.limits.master_port] if name == first else [0] for name in names}
        answers = agents.ask(
            {name: {"do": "listen", "ports": wanted} for name, wanted in ports.items()},
            timeout_s=self.limits.time_limit_s,
        )
        listening = {name: answer.value for name, answer in self._answers(answers, "network").items()}
        if len(listening) < len(names):
            return False
        if isinstance(refused := listening[first][1], str):
            step = "Another run may be left there; or choose another port with --master_port."
            seen = f"port {self.limits.master_port}, where the ranks meet: {refused}."
            self.findings.append(Finding(first, "network", seen, step))
            return False
        self._ports = {name: answer[0] for name, answer in listening.items()}
        targets = [(name, self.reports[name].meeting_address, self._ports[name]) for name in names]
        meeting = (
            f"{first}, port {self.limits.master_port}",
            self._master_address(),
            self.limits.master_port,
        )
        questions = {
            name: {
                "do": "reach",
                "targets": [*(t for t in targets if t[0] != name), *[meeting] * (name != first)],
            }
            for name in names
        }
        answers = agents.ask(questions, timeout_s=self.limits.time_limit_s)
        unreachable = {name: answer.value for name, answer in self._answers(answers, "network").items()}
        found = reach_findings(unreachable)
        self.findings += found
        return len(unreachable) == len(names) and not found

    def measure_links(self, agents: Agents) -> None:
        """What each host sends to the next one while all do so: the ring that an all-reduce uses."""
        names = [host.name for host in self.hosts]
        after = dict(zip(names, [*names[1:], names[0]], strict=True))
        questions = {
            name: {"do": "stream", "target": (other, self.reports[other].meeting_address, self._ports[other])}
            for name, other in after.items()
        }
        answers = agents.ask(questions, timeout_s=self.limits.time_limit_s)
        for name, answer in self._answers(answers, "network").items():
            self.rates[name, after[name]] = answer.value
        self.findings += link_findings(self.rates, self.limits)
        agents.ask_all({"do": "close"}, timeout_s=self.limits.time_limit_s)  # the ranks need the master port

    def reduce(self, agents: Agents) -> None:
        """One rank a host, through the backend of the training."""
        limit = self.limits.time_limit_s
        meeting = {
            "address": self._master_address(),
            "port": self.limits.master_port,
            "world_size": len(self.hosts),
            "time_limit_s": limit,
        }
        answers = agents.ask(
            {host.name: {"do": "reduce", "rank": rank, **meeting} for rank, host in enumerate(self.hosts)},
            timeout_s=limit + 20,
        )
        for name, answer in self._answers(answers, "all-reduce").items():
            self.reductions[name] = Reduction(**answer.value)
        self.findings += reduction_findings(self.reductions, self.limits)

    def table(self) -> str:
        """A line for each host."""
        rows: list[tuple[str, ...]] = [
            ("host", "orpo_ds", "torch", "GPUs", "clock", "disk", "/dev/shm", "sends", "all-reduce")
        ]
        wrong = {(finding.host, finding.thing) for finding in self.findings}
        for host in self.hosts:
            if (report := self.reports.get(host.name)) is None:
                rows.append((host.name, "no answer", *[""] * 7))
                continue
            sends = [rate for (sender, _), rate in self.rates.items() if sender == host.name]
            reduction = self.reductions.get(host.name)
            reduced = gbit(reduction.bytes_a_second) if reduction and not reduction.error else None
            rows.append(
                (
                    host.name,
                    "differs" if (host.name, "code") in wrong else "same",
                    report.packages.get("torch", "none"),
                    str(len(report.gpus)),
                    f"{self.skews[host.name]:+.1f} s",
                    f"{min(report.free_bytes.values()) / GIB:.1f} GiB",
                    f"{report.shared_memory_bytes / MIB:.0f} MiB",
                    f"{gbit(sends[0]):.3g} Gbit/s" if sends else "",
                    "" if reduction is None else "failed" if reduced is None else f"{reduced:.3g} Gbit/s",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def _answers(self, answers: Mapping[str, Answer], thing: str) -> dict[str, Answer]:
        """Those that came; the others become findings."""
        for name, answer in answers.items():
            if answer.value is None and answer.error:
                step = (
                    f"`ssh {name} true` (or srun) must work, and {sys.executable} exist there with orpo_ds."
                )
                self.findings.append(Finding(name, thing, f"no answer: {answer.error}.", step))
        return {name: answer for name, answer in answers.items() if not answer.error}

    def _master_address(self) -> str:
        """Where DeepSpeed lets the ranks meet: the first address of the first host."""
        report = self.reports[self.hosts[0].name]
        return report.addresses[0] if report.addresses else report.meeting_address


def request_of(words: Sequence[str]) -> Request:
    """What of the run the hosts must have, and where it writes.

    The fields are read without building the settings: the host that starts the run may have no GPU, and need not
    accept what the others will.

    Args:
        words: `--config FILE` and flags of `orpo-ds train`.

    Raises:
        ValueError: the config cannot be read.
    """
    from orpo_ds.cli import read_yaml

    flags = dict(_flags(words))
    config = flags.pop(CONFIG, None)
    fields = {**(read_yaml(str(config)) if config is not None else {}), **flags}
    files = {
        name: path
        for field, value in fields.items()
        if field not in FOLDERS
        for name, path in _paths(field, value)
    }
    if config is not None:
        files[CONFIG] = str(config)
    folders = {name: str(fields[name]) for name in FOLDERS if isinstance(fields.get(name), str)}
    folders.setdefault("output_dir", ".")
    caches = {"HF_HOME": os.environ.get("HF_HOME", "~/.cache/huggingface"), "TMPDIR": tempfile.gettempdir()}
    return Request(files=files, folders={**folders, **caches})


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str | list[str]]]:
    """`--name value`, `--name=value` and `--name a b` as pairs."""
    name, values = "", []
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name:
            yield name, values[0] if len(values) == 1 else values
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []


def _paths(field: str, value: Any) -> Iterator[tuple[str, str]]:
    """Files and folders that a field names: what exists here, or is written as a path."""
    if isinstance(value, str):
        is_path = value.startswith(("/", "~", "./", "../")) or (
            "\n" not in value and len(value) < 1024 and Path(value).exists()
        )
        if value and is_path:
            yield field, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(f"{field}.{key}", item)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _paths(f"{field}[{place}]", item)


def slurm_slots() -> dict[str, int]:
    """Hosts of this SLURM job, each with its tasks.

    Raises:
        ValueError: this is no SLURM job, or SLURM does not say which hosts it has.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise ValueError(
            "--slurm: there is no job here (SLURM_JOB_NODELIST is not set). Call it in a batch script."
        )
    try:
        listed = slurm.run("scontrol", "show", "hostnames", nodes)
    except slurm.SlurmError as error:
        raise ValueError(f"--slurm: {error}") from error
    tasks = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    return dict.fromkeys(listed.split(), tasks)


def parser() -> argparse.ArgumentParser:
    """The options of the command; all others are the run's."""
    made = argparse.ArgumentParser(
        prog="orpo-ds preflight",
        allow_abbrev=False,
        description="Check this host, or all hosts of a run. All other arguments are those of `train`.",
    )
    made.add_argument("--hostfile", help="Check the hosts of this hostfile over ssh.")
    made.add_argument("--slurm", action="store_true", help="Check the hosts of this SLURM job over srun.")
    add_limits(made)
    return made


def add_limits(made: argparse.ArgumentParser) -> None:
    """The options that say what a host must have."""
    usual = Limits()
    made.add_argument("--master_port", type=int, default=usual.master_port, help="Where the ranks will meet.")
    made.add_argument(
        "--disk_gib", type=float, default=usual.disk_gib, help="Free space where output_dir is."
    )
    made.add_argument(
        "--shared_memory_mib",
        type=float,
        default=usual.shared_memory_mib,
        help="Free in /dev/shm, for each process.",
    )
    made.add_argument("--clock_s", type=float, default=usual.clock_s, help="How much clocks may differ.")
    made.add_argument(
        "--min_gbit", type=float, default=usual.min_gbit, help="Least bandwidth between two hosts."
    )
    made.add_argument(
        "--time_limit_s", type=float, default=usual.time_limit_s, help="Seconds that each question may take."
    )
    made.add_argument("--skip", nargs="+", default=[], choices=THINGS, help="What is not looked at.")


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits that the options say."""
    return Limits(
        disk_gib=options.disk_gib,
        shared_memory_mib=options.shared_memory_mib,
        clock_s=options.clock_s,
        min_gbit=options.min_gbit,
        time_limit_s=options.time_limit_s,
        master_port=options.master_port,
        skip=frozenset(options.skip),
    )
