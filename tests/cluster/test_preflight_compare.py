"""Who is named when hosts differ: reports in, findings out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orpo_ds.cluster.preflight import request_of
from orpo_ds.cluster.preflight_allreduce import Reduction
from orpo_ds.cluster.preflight_compare import (
    GIB,
    Limits,
    clock_findings,
    compare,
    link_findings,
    reach_findings,
    reduction_findings,
)
from orpo_ds.cluster.preflight_host import BLOCK_BYTES, WHOLE_BYTES, Gpu, HostReport, hash_of

GOOD = HostReport(
    host="good",
    python="3.11.7",
    packages={"torch": "2.13.0", "deepspeed": "0.19.8"},
    code={"orpo_ds/trainer.py": "a" * 64},
    files={"config": "b" * 64},
    free_bytes={"output_dir": 100 * GIB},
    read_only=[],
    shared_memory_bytes=8 * GIB,
    gpus=[Gpu("NVIDIA H100", "550.54", 81559)] * 8,
    addresses=["10.0.0.1"],
    meeting_address="10.0.0.1",
    clock=0.0,
)
HOSTS = ("a", "b", "c")


def named(reports: dict[str, HostReport], *, starter: HostReport = GOOD) -> list[tuple[str, str]]:
    found = compare(reports, starter=starter, slots=dict.fromkeys(reports, 8), limits=Limits())
    return [(finding.host, finding.thing) for finding in found]


def test_equal_hosts_are_fit() -> None:
    assert named(dict.fromkeys(HOSTS, GOOD)) == []


@pytest.mark.parametrize(
    ("thing", "change"),
    [
        ("python", {"python": "3.12.1"}),
        ("packages", {"packages": {"torch": "2.12.0", "deepspeed": "0.19.8"}}),
        ("packages", {"packages": {"torch": "2.13.0"}}),
        ("code", {"code": {"orpo_ds/trainer.py": "c" * 64}}),
        ("files", {"files": {"config": "absent"}}),
        ("gpus", {"gpus": [Gpu("NVIDIA H100", "550.54", 81559)] * 7}),
        ("gpus", {"gpus": [Gpu("NVIDIA H100", "535.10", 81559)] * 8}),
        ("gpus", {"gpus": []}),
        ("disk", {"free_bytes": {"output_dir": 9 * GIB}}),
        ("disk", {"read_only": ["output_dir"]}),
        ("shared memory", {"shared_memory_bytes": 64 << 20}),
        ("network", {"meeting_address": "127.0.1.1"}),
    ],
)
@pytest.mark.parametrize("bad", HOSTS)
def test_the_one_that_differs_is_named(thing: str, change: dict[str, object], bad: str) -> None:
    reports = {host: replace(GOOD, **change) if host == bad else GOOD for host in HOSTS}  # type: ignore[arg-type]
    assert named(reports) == [(bad, thing)]


def test_of_two_hosts_the_one_that_differs_from_the_starter_is_named() -> None:
    odd = replace(GOOD, python="3.12.1")
    assert named({"a": odd, "b": GOOD}) == [("a", "python")]
    assert named({"a": odd, "b": GOOD}, starter=odd) == [("b", "python")]
    # A login node may have no dataset: what it lacks is no vote.
    lacks = replace(GOOD, files={"config": "absent"})
    assert named({"a": GOOD, "b": lacks}, starter=lacks) == [("b", "files")]


def test_clocks() -> None:
    found = clock_findings({"a": 0.2, "b": -7.0, "c": 4.9}, Limits())
    assert [(finding.host, "7.0 s behind" in finding.seen) for finding in found] == [("b", True)]


def test_the_host_in_most_broken_pairs_is_named() -> None:
    broken = {"a": {"b": "no answer"}, "b": {"a": "no answer", "c": "no answer"}, "c": {"b": "no answer"}}
    assert {finding.host for finding in reach_findings(broken)} == {"b"}
    assert reach_findings({"a": {}, "b": {}}) == []


def test_a_slow_host_among_fast_ones_is_named() -> None:
    fast, slow = 1.25e9, 1.25e8
    hosts = ("a", "b", "c", "d", "e")
    ring = dict(zip(hosts, (*hosts[1:], hosts[0]), strict=True))
    rates = {(sender, to): slow if "c" in (sender, to) else fast for sender, to in ring.items()}
    assert [finding.host for finding in link_findings(rates, Limits())] == ["c", "c"]
    assert link_findings(dict.fromkeys(rates, fast), Limits()) == []
    assert len(link_findings(dict.fromkeys(rates, fast), Limits(min_gbit=25))) == 5


def test_who_came_least_far_in_the_all_reduce_is_named_first() -> None:
    well = Reduction("reduced", "", "gloo", 10**9, 1.0)
    assert reduction_findings({"a": well, "b": well}, Limits()) == []
    assert [
        f.host for f in reduction_findings({"a": well, "b": replace(well, seconds=2.0)}, Limits(min_gbit=5))
    ] == ["b"]
    found = reduction_findings(
        {"a": Reduction("started", "late"), "b": Reduction("nothing", "no torch")}, Limits()
    )
    assert [finding.host for finding in found] == ["b", "a"]


def test_hashes_see_content_names_and_the_middle_of_large_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").write_text("1")
    before = hash_of(folder)
    (folder / "a").rename(folder / "b")
    renamed = hash_of(folder)
    (folder / "b").write_text("2")
    assert len({before, renamed, hash_of(folder), hash_of(tmp_path / "none")}) == 4
    assert hash_of(tmp_path / "none") == hash_of(folder / "*.jsonl") == "absent"
    assert hash_of(folder / "[ab]") != "absent"

    large = folder / "large"
    with large.open("wb") as stream:
        stream.truncate(WHOLE_BYTES + 5 * BLOCK_BYTES)  # a hole: it takes no disk
    empty = hash_of(large)
    with large.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    assert hash_of(large) != empty


def test_what_the_run_names_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.jsonl").write_text("")
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: Qwen/Qwen2.5-0.5B\ndataset_name: /data/train.jsonl\noutput_dir: runs/a\nbeta: 0.1\n"
        "datasets: [eval.jsonl, {path: ./more, split: train}]\n"
    )
    request = request_of(
        ["--config", str(config), "--dataset_name=/data/other.jsonl", "--do_eval", "--output_dir", "/out"]
    )
    assert request.files == {
        "config": str(config),
        "dataset_name": "/data/other.jsonl",
        "datasets[0]": "eval.jsonl",
        "datasets[1].path": "./more",
    }
    assert request.folders["output_dir"] == "/out"
