"""An estimate in words: what a rank holds, what a step costs, what the training costs, and what to take instead."""

from __future__ import annotations

from collections.abc import Mapping

from orpo_ds.estimate.hardware import CUDA_RESERVE_BYTES, GB, PROCESS_BYTES
from orpo_ds.estimate.plans import MARGIN, Estimate


def report(one: Estimate, *, best: Estimate | None, about_pairs: str, title: str) -> str:
    """The page that `orpo-ds estimate` prints.

    Args:
        one: the run as it is set.
        best: the fastest way that fits, or None.
        about_pairs: where the lengths are from.
        title: the model and what is trained of it.
    """
    gpu, cluster, memory, work = one.cluster.gpu, one.cluster, one.memory, one.work
    inside = {
        **memory.states.device,
        "activations": memory.replayed.saved,
        "working memory of backward": max(memory.backward - memory.replayed.saved, 0),
    }
    if memory.update > memory.backward:
        inside = {**memory.states.device, "gradients and working memory of the update": memory.update}
    lines = [
        title,
        f"{cluster.nodes} x {cluster.gpus_per_node} {gpu.name}; ZeRO-{one.plan.stage}, optimizer on the "
        f"{_place(one.plan.optimizer_on)}, parameters on the {_place(one.plan.parameters_on)}, gradient checkpointing "
        f"{'on' if one.recomputes else 'off'}",
        f"lengths: {about_pairs}",
        f"fullest micro-batch {work.fullest_tokens:,} tokens; {work.pairs_a_step:,} pairs a step in "
        f"{work.micro_steps:.0f} micro-batches a rank",
        "",
        *_table("a GPU, GB", inside | {"CUDA and NCCL (assumed)": CUDA_RESERVE_BYTES}, of=gpu.memory_bytes),
        "",
        *_table(
            "a node's host, GB",
            {name: size * cluster.gpus_per_node for name, size in memory.states.host.items()}
            | {"processes": PROCESS_BYTES * cluster.gpus_per_node},
            of=cluster.host_bytes_per_node,
        ),
        f"  {'while loading':<44}{(one.loading + PROCESS_BYTES * cluster.gpus_per_node) / GB:>10.1f}",
    ]
    if memory.states.drive:
        lines += ["", *_table("a rank's drive, GB", memory.states.drive, of=None)]
    lines += ["", *_time(one), "", _verdict(one, best)]
    return "\n".join(lines)


def _table(heading: str, terms: Mapping[str, int], *, of: int | None) -> list[str]:
    limit = "" if of is None else f" of {of / GB:.0f}"
    return [
        heading,
        *(f"  {name:<44}{size / GB:>10.2f}" for name, size in terms.items() if size),
        f"  {'together':<44}{sum(terms.values()) / GB:>10.2f}{limit}",
    ]


def _time(one: Estimate) -> list[str]:
    time = one.time
    overlap = "overlapped" if time.hidden else "one after the other"
    lines = [
        f"a step: {time.total:.2f} s (arithmetic {time.compute:.2f}, network {time.network:.2f} {overlap}, update on "
        f"the host {time.update:.2f}); a rank sends {time.sent / GB:.1f} GB",
    ]
    if one.days is None:
        lines.append("the whole training: not known; set max_steps, or have the dataset on this machine")
    else:
        price = "no price known: --usd-per-gpu-hour" if one.usd is None else f"{one.usd:,.0f} USD"
        lines.append(f"the whole training: {one.work.steps:,} steps, {one.days:.2f} days, {price}")
    return [*lines, "times are computed from vendors' figures, none was measured: docs/scaling.md"]


def _verdict(one: Estimate, best: Estimate | None) -> str:
    spare = f"with {MARGIN - 1:.0%} to spare"
    own = f"It fits {spare}." if one.fits else f"It does NOT fit {spare}."
    if best is None:
        return (
            f"{own} No preset fits: take more GPUs or nodes, lower max_length or max_tokens_per_micro_batch, or train "
            "adapters (use_peft)."
        )
    checkpointing = "on" if best.recomputes else "off"
    faster = f", {one.time.total / best.time.total:.2f} times as fast" if one.fits else ""
    return (
        f"{own} The fastest preset that fits: deepspeed: {best.name} with gradient_checkpointing {checkpointing}, "
        f"{best.time.total:.2f} s a step{faster}, {best.device_bytes / GB:.1f} GB a GPU."
    )


def _place(where: str) -> str:
    return {"device": "GPU", "cpu": "host", "nvme": "drive"}[where]
