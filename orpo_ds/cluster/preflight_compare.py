"""What is wrong with which host: reports in, findings out. Nothing here asks a host for anything.

Where hosts differ, the majority is taken for right; the host that starts the run votes too, so that of two hosts the
one that differs from it is named. Without a majority the first host of the hostfile is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from orpo_ds.cluster.preflight_allreduce import PHASES, Reduction
from orpo_ds.cluster.preflight_host import ABSENT, HostReport

GIB = 1 << 30
MIB = 1 << 20
SLOW_SHARE = 0.25  # of the median link: a cable at a tenth of its speed, not a busy moment
LOOPBACK = ("127.", "0.", "")


@dataclass(frozen=True)
class Limits:
    """What a host must have."""

    disk_gib: float = 10.0  # free where output_dir is; a tenth of it in the folders of caches
    shared_memory_mib: float = 128.0  # free in /dev/shm for each process
    clock_s: float = 5.0
    min_gbit: float = 0.0  # of a link between two hosts, and of the all-reduce
    time_limit_s: float = 120.0  # of each question
    master_port: int = 29500
    skip: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one host, the values seen, and what to do."""

    host: str
    thing: str
    seen: str
    step: str

    def __str__(self) -> str:
        return f"{self.host}: {self.thing}: {self.seen} {self.step}"


def compare(
    reports: Mapping[str, HostReport], *, starter: HostReport, slots: Mapping[str, int], limits: Limits
) -> list[Finding]:
    """Everything that the reports alone show.

    Args:
        reports: host name -> its report, in the order of the hostfile.
        starter: the report of the host that starts the run.
        slots: host name -> processes.
        limits: what each host must have.
    """
    findings = [
        *_differing(reports, starter, "python", lambda report: report.python),
        *_differing_entries(reports, starter, "code", lambda report: report.code),
        *_differing_entries(reports, starter, "packages", lambda report: report.packages),
        *_differing_entries(reports, starter, "files", lambda report: report.files),
        *_gpu_findings(reports, slots),
    ]
    for host, report in reports.items():
        findings += _lacking(host, report, slots[host], limits)
    return findings


STEPS = {
    "python": "Use the same Python everywhere: the same environment or container image on each host.",
    "code": "Update the checkout or the installed package there; PYTHONPATH may point to another one.",
    "packages": "Install the same versions there (constraints.txt).",
    "files": "Copy the file there, or keep it on storage that all hosts share.",
    "gpus": "Take the host out of the hostfile, or make them the same.",
}


def _differing(
    reports: Mapping[str, HostReport],
    starter: HostReport,
    thing: str,
    value_of: Callable[[HostReport], str],
    *,
    label: str = "",
) -> list[Finding]:
    """Hosts whose value is not that of the majority."""
    values = {host: value_of(report) for host, report in reports.items()}
    right = _right(list(values.values()), value_of(starter))
    return [
        Finding(
            host,
            thing,
            f"{label}{_short(value)}, where {_who(values, right)} {_short(right)}.",
            STEPS[thing],
        )
        for host, value in values.items()
        if value != right
    ]


def _differing_entries(
    reports: Mapping[str, HostReport],
    starter: HostReport,
    thing: str,
    entries_of: Callable[[HostReport], Mapping[str, str]],
) -> list[Finding]:
    """The same for a table; however many entries differ, a host is one finding, with the first and their number."""
    names = sorted({name for report in reports.values() for name in entries_of(report)})
    found: dict[str, list[Finding]] = {}
    for name in names:
        for finding in _differing(
            reports,
            starter,
            thing,
            lambda report, name=name: entries_of(report).get(name, ABSENT),  # type: ignore[misc]
            label=f"{name} is ",
        ):
            found.setdefault(finding.host, []).append(finding)
    return [
        Finding(first.host, thing, first.seen + (f" So do {len(rest)} more." if rest else ""), first.step)
        for first, *rest in found.values()
    ]


def _right(values: list[str], of_starter: str) -> str:
    """The value of most hosts; the starter votes too where it has the thing at all, and ties go to the first host."""
    counts = Counter(values)
    if of_starter in counts and of_starter != ABSENT:
        counts[of_starter] += 1
    return max(values, key=lambda value: (counts[value], value != ABSENT, value == values[0]))


def _who(values: Mapping[str, str], right: str) -> str:
    """Who has the right value: `node1 has`, or `7 of 8 hosts have`."""
    having = [host for host, value in values.items() if value == right]
    return f"{having[0]} has" if len(having) == 1 else f"{len(having)} of {len(values)} hosts have"


def _short(value: str) -> str:
    """A hash by its first digits; anything else as it is."""
    is_hash = len(value) == 64 and set(value) <= set("0123456789abcdef")
    return f"{value[:12]}…" if is_hash else value


def _gpu_findings(reports: Mapping[str, HostReport], slots: Mapping[str, int]) -> list[Finding]:
    """Too few GPUs for the slots, or other GPUs or drivers; nothing where no host has one."""
    if not any(report.gpus for report in reports.values()):
        return []
    findings = [
        Finding(host, "gpus", f"{len(report.gpus)} GPUs for {slots[host]} slots.", STEPS["gpus"])
        for host, report in reports.items()
        if len(report.gpus) < slots[host]
    ]
    kinds = {host: _gpu_kinds(report) for host, report in reports.items() if report.gpus}
    right = _right(list(kinds.values()), ABSENT)
    return findings + [
        Finding(host, "gpus", f"{kind}, where {_who(kinds, right)} {right}.", STEPS["gpus"])
        for host, kind in kinds.items()
        if kind != right
    ]


def _gpu_kinds(report: HostReport) -> str:
    kinds = sorted({f"{gpu.name} with driver {gpu.driver}" for gpu in report.gpus})
    return " and ".join(kinds)


def _lacking(host: str, report: HostReport, slots: int, limits: Limits) -> list[Finding]:
    """What one host lacks whatever the others have."""
    findings = []
    for name, free in report.free_bytes.items():
        needed = limits.disk_gib * GIB * (1.0 if name == "output_dir" else 0.1)
        if free < needed:
            seen = f"{free / GIB:.2f} GiB free in {name}, needed {needed / GIB:g}."
            findings.append(Finding(host, "disk", seen, "Remove old runs, or write elsewhere (--disk_gib)."))
    findings += [
        Finding(host, "disk", f"{name} cannot be written to.", "Mount it for writing, or choose another.")
        for name in report.read_only
    ]
    needed = limits.shared_memory_mib * MIB * slots
    if report.shared_memory_bytes < needed:
        seen = f"{report.shared_memory_bytes / MIB:.0f} MiB free in /dev/shm, needed {needed / MIB:.0f}."
        step = "Remove what is left there, or start the container with more (docker --shm-size)."
        findings.append(Finding(host, "shared memory", seen, step))
    if report.meeting_address.startswith(LOOPBACK[:2]) or report.meeting_address == "":
        seen = f"the other hosts would look for it at {report.meeting_address or 'no address'}."
        step = (
            "Let its name mean its address in /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
        )
        findings.append(Finding(host, "network", seen, step))
    return findings


def clock_findings(skews: Mapping[str, float], limits: Limits) -> list[Finding]:
    """Hosts whose clock differs from the starter's.

    Args:
        skews: host -> seconds that its clock is ahead.
        limits: how much is too much.
    """
    return [
        Finding(
            host,
            "clock",
            f"{abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}, allowed {limits.clock_s:g} (--clock_s).",
            "Start a time service there (chronyd, systemd-timesyncd).",
        )
        for host, skew in skews.items()
        if abs(skew) > limits.clock_s
    ]


def reach_findings(unreachable: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Pairs of hosts without a connection; a host that is in more of them than any other is named as the bad one.

    Args:
        unreachable: host -> target that it could not reach -> why. A target's name is `host` or `host, master_port`.
    """
    pairs = [(host, target, why) for host, targets in unreachable.items() for target, why in targets.items()]
    times = Counter(name for host, target, _ in pairs for name in (host, target.partition(",")[0]))
    findings = []
    for host, target, why in pairs:
        other = target.partition(",")[0]
        bad = host if times[host] > times[other] else other
        findings.append(
            Finding(
                bad,
                "network",
                f"{host} cannot reach {target}: {why}.",
                "Open the ports between the hosts: the ranks use the master port and any free ones above 1024.",
            )
        )
    return findings


def link_findings(rates: Mapping[tuple[str, str], float], limits: Limits) -> list[Finding]:
    """Links that carry nothing, less than asked for, or far less than the others.

    Args:
        rates: (sender, receiver) -> bytes a second.
        limits: the least bandwidth.
    """
    if not rates:
        return []
    usual = median(rates.values())
    floor = max(limits.min_gbit, SLOW_SHARE * gbit(usual))
    slow = [(pair, rate) for pair, rate in rates.items() if rate == 0 or gbit(rate) < floor]
    # A slow host is slow on its way in and on its way out: it is in two of the slow links, its neighbours in one.
    times = Counter(host for pair, _ in slow for host in pair)
    step = "Look at its cable and switch port; another interface: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME."
    return [
        Finding(
            max(reversed(pair), key=lambda host: times[host]),
            "network",
            f"{pair[0]} sends {gbit(rate):.3g} Gbit/s to {pair[1]}, and the least is {floor:.3g}.",
            step,
        )
        for pair, rate in slow
    ]


def reduction_findings(reductions: Mapping[str, Reduction], limits: Limits) -> list[Finding]:
    """An all-reduce that did not end, or not well, or slowly; who came least far is named first."""
    failed = {host: reduction for host, reduction in reductions.items() if reduction.error}
    step = "Try NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says which interface was taken."
    findings = [
        Finding(host, "all-reduce", f"came as far as {reduction.phase!r}: {reduction.error}.", step)
        for host, reduction in sorted(failed.items(), key=lambda item: PHASES.index(item[1].phase))
    ]
    if not failed and reductions:
        host, slowest = min(reductions.items(), key=lambda item: item[1].bytes_a_second)
        if gbit(slowest.bytes_a_second) < limits.min_gbit:
            seen = f"{gbit(slowest.bytes_a_second):.3g} Gbit/s, asked for {limits.min_gbit:g} (--min_gbit)."
            findings.append(Finding(host, "all-reduce", seen, step))
    return findings


def gbit(bytes_a_second: float) -> float:
    """Gbit/s of bytes a second."""
    return bytes_a_second * 8 / 1e9
