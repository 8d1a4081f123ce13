"""`orpo-ds submit`: a batch job of SLURM for a run.

    orpo-ds submit --nodes 4 --gpus-per-node 8 --time 04:00:00 run.yaml [--any_field value …]

Prints the script, asks `estimate` whether the run fits, hands it to `sbatch`, and follows the log; Ctrl-C leaves the
job alone. What stands after the YAML file are fields of the run. An option before it that is not one of `submit` goes
to `sbatch` as it is (`--mem=0`).

The job comes back by itself: `orpo-ds supervise --requeue` in it hands the signal before the time limit on to the
ranks, which save and end, and requeues the job until the training is done. The scripts of `launch/slurm/` are what
this command prints.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orpo_ds.cli import RunError, read_yaml
from orpo_ds.cluster import slurm
from orpo_ds.cluster.follow import follow
from orpo_ds.cluster.restarts import DEFAULT_LIMIT, DEFAULT_OUTPUT_DIR, option
from orpo_ds.redact import redact_command_line

SIGNAL_SECONDS = 120
SEED = '"$SLURM_ARRAY_TASK_ID"'


@dataclass(frozen=True)
class Job:
    """A batch job for one run, or for one run a seed.

    Attributes:
        config: the run's YAML file.
        flags: fields of the run beside it.
        nodes: machines.
        gpus_per_node: GPUs, and so ranks, on each.
        time: limit of one start, as SLURM takes it (`04:00:00`).
        task_per: a task for each GPU, started by `srun`; or for each node, where DeepSpeed's launcher starts the ranks.
        name: of the job.
        log: SLURM's pattern of the log's path; None: `slurm-%j.log` here.
        seeds: SLURM's array of seeds (`1-5`, `1,2,7`, `1-5%2` for two at a time); None for one run.
        container: an image. A file of Apptainer (`x.sif`); anything else is one for enroot, through pyxis.
        signal_s: seconds before the time limit at which the run is asked to save.
        limit: restarts without a new checkpoint, in a row, after which the chain of jobs ends.
        preflight: check the nodes before each start.
        sbatch: further options of `sbatch`.
    """

    config: str
    flags: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 1
    time: str = "04:00:00"
    task_per: Literal["gpu", "node"] = "gpu"
    name: str = "orpo"
    log: str | None = None
    seeds: str | None = None
    container: str | None = None
    signal_s: int = SIGNAL_SECONDS
    limit: int = DEFAULT_LIMIT
    preflight: bool = True
    sbatch: tuple[str, ...] = ()

    @property
    def log_pattern(self) -> str:
        """Where SLURM writes; a job that comes back appends."""
        return self.log or ("slurm-%A_%a.log" if self.seeds else "slurm-%j.log")

    @property
    def output_dir(self) -> str:
        """Of the run; an array has a folder for each seed in there."""
        fields = read_yaml(self.config)
        return str(option(self.flags, "output_dir") or fields.get("output_dir") or DEFAULT_OUTPUT_DIR)


def main(words: Sequence[str]) -> None:
    """Run `orpo-ds submit`."""
    options, job = parse(words)
    text = script(job)
    print(text, flush=True)
    if options.print_only:
        return
    if not options.no_estimate:
        ask_estimate(job, gpu=options.gpu)
    try:
        number = send(text)
        print(f"orpo-ds submit: job {number}; `scancel {number}` ends it for good", flush=True)
        if not options.no_follow:
            state = follow(number, pattern=job.log_pattern)
            if state not in ("COMPLETED", None):
                raise RunError(f"job {number} ended as {state}; its log says why: {job.log_pattern}")
    except slurm.SlurmError as error:
        raise RunError(str(error)) from error


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, Job]:
    """What is to be done, and the job.

    Raises:
        ValueError: no YAML file, or words that cannot be told apart.
    """
    parser = _parser()
    with_value = {
        name for action in parser._actions if action.nargs is None for name in action.option_strings
    }
    words, ours, sbatch = list(words), [], []
    while words and words[0].startswith("-"):
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name not in parser._option_string_actions:
            if not equals and words and not words[0].startswith("-") and not _is_yaml(words[0]):
                raise ValueError(f"{word}: options for sbatch are written --name=value: {word}={words[0]}")
            sbatch.append(word)
            continue
        ours.append(word)
        if not equals and name in with_value and words:
            ours.append(words.pop(0))
    options = parser.parse_args(ours)
    if not words:
        raise ValueError("no YAML file: orpo-ds submit [options] run.yaml [--any_field value …]")
    config, *flags = words
    read_yaml(config)
    named = [
        f"--{name}={getattr(options, name)}"
        for name in ("partition", "account", "qos")
        if getattr(options, name)
    ]
    return options, Job(
        config=config,
        flags=tuple(flags),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        time=options.time,
        task_per=options.task_per,
        name=options.job_name,
        log=options.log,
        seeds=options.seeds,
        container=options.container,
        signal_s=options.signal_s,
        limit=options.max_restarts_without_progress,
        preflight=not options.no_preflight,
        sbatch=(*named, *sbatch),
    )


def ask_estimate(job: Job, *, gpu: str) -> None:
    """Print what the run will need.

    Args:
        job: says how many GPUs there are.
        gpu: each of them: its memory (`80GB`) or name (`H100`).

    Raises:
        ValueError: the run does not fit, or is one that `train` refuses.
    """
    from orpo_ds.estimate import estimate_run, parse_cluster

    cluster = parse_cluster(f"{job.gpus_per_node}x{gpu}", nodes=job.nodes)
    answer = estimate_run(["--config", job.config, *job.flags], cluster)
    print(answer.text, flush=True)
    if not answer.fits:
        raise ValueError(
            f"by the estimate above the run does not fit {job.nodes} x {job.gpus_per_node} GPUs of {gpu}. Take a "
            "preset that fits, or more GPUs; --gpu names other GPUs, and --no-estimate submits it all the same."
        )


def send(text: str) -> str:
    """Hand a script to `sbatch`, from this folder; returns the job's id.

    Raises:
        SlurmError: SLURM does not take it; says why.
    """
    return slurm.run("sbatch", "--parsable", stdin=text).strip().partition(";")[0]


def script(job: Job) -> str:
    """The batch script of a job.

    Raises:
        ValueError: a token stands among the fields: it would be readable by all in SLURM's records.
    """
    words = list(job.flags)
    if redact_command_line(words) != words:
        raise ValueError(
            "a token stands among the fields of the run, and others can read a script in SLURM: set HF_TOKEN or "
            "WANDB_API_KEY in the environment, which sbatch passes on, or log in."
        )
    per_node = job.gpus_per_node if job.task_per == "gpu" else 1
    head = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={per_node}",
        f"--gpus-per-node={job.gpus_per_node}",
        f"--time={job.time}",
        f"--output={job.log_pattern}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{job.signal_s}",
        *([f"--array={job.seeds}"] if job.seeds else []),
        *job.sbatch,
    ]
    fields = shlex.join(["--config", job.config, *words]) + ' "$@" --resume_from_checkpoint auto'
    if job.seeds:
        fields += f" --seed {SEED} --output_dir {shlex.quote(job.output_dir)}/seed-{SEED}"
    preflight = shlex.join(["python", "-m", "orpo_ds", "preflight", "--slurm", "--config", job.config])
    task_per_node = job.task_per == "node"
    gpus = ",".join(map(str, range(job.gpus_per_node)))
    return SCRIPT.format(
        what=_described(job),
        head="\n".join(f"#SBATCH {line}" for line in head),
        world=WORLD_INFO.format(gpus=gpus) if task_per_node else "",
        container=_container(job.container),
        limit=job.limit,
        before=f" \\\n    --before {_double_quoted(preflight)}" if job.preflight else "",
        start=TASK_PER_NODE if task_per_node else TASK_PER_GPU,
        fields=fields,
    )


SCRIPT = """\
#!/usr/bin/env bash
# {what}
{head}
set -euo pipefail

# The ranks meet on the first node. The port is the job's own: two jobs may share a node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
{world}# Since SLURM 22.05 srun does not take --cpus-per-task from the job.
if [[ -n ${{SLURM_CPUS_PER_TASK:-}} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

{container}
# SLURM signals supervise, which asks the ranks to save, and requeues the job until the training is done.
# A rank that is not ready for the signal yet must not die of it: `trap "" USR1`.
exec python -m orpo_ds supervise --requeue --max-restarts-without-progress {limit}{before} \\
    -- srun --kill-on-bad-exit=1 "${{pyxis[@]}}" "${{apptainer[@]}}" \\
    {start} \\
    orpo-ds {fields}
"""
TASK_PER_GPU = """\
bash -c 'trap "" USR1
             export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
             exec python -m orpo_ds train "$@"'"""
TASK_PER_NODE = """\
bash -c 'trap "" USR1
             exec python -m deepspeed.launcher.launch --world_info="$WORLD_INFO" --node_rank="$SLURM_NODEID" \\
                 --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --module orpo_ds train "$@"'"""
WORLD_INFO = """\
# For DeepSpeed's launcher on each node: {{"node1": [0, 1, ...], "node2": ...}} in base64.
WORLD_INFO=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/.*/"&": [{gpus}]/' | paste -sd, |
    sed 's/.*/{{&}}/' | base64 -w0 | tr '+/' '-_')
export WORLD_INFO
"""


def _container(image: str | None) -> str:
    """The lines that put the ranks into a container; comments without one."""
    apptainer = 'apptainer=(apptainer exec --nv --bind "$PWD" {image})'
    pyxis = 'pyxis=(--container-image={image} --container-mounts="$PWD:$PWD" --container-workdir="$PWD")'
    if image is None:
        return (
            "# In a container, whose image has this package installed:\n"
            f"pyxis=()      # enroot:    {pyxis.format(image='IMAGE')}\n"
            f"apptainer=()  # Apptainer: {apptainer.format(image='IMAGE.sif')}\n"
        )
    quoted = shlex.quote(image)
    if Path(image).suffix in (".sif", ".img"):
        return f"pyxis=()\n{apptainer.format(image=quoted)}\n"
    return f"{pyxis.format(image=quoted)}\napptainer=()\n"


def _described(job: Job) -> str:
    nodes = "One node" if job.nodes == 1 else f"{job.nodes} nodes"
    gpus = f"{job.gpus_per_node} GPU{'s' if job.gpus_per_node > 1 else ''}"
    seeds = f", for each of the seeds {job.seeds}" if job.seeds else ""
    return f"{nodes} with {gpus}, one task a {'GPU' if job.task_per == 'gpu' else 'node'}{seeds}."


def _double_quoted(command: str) -> str:
    """A command as one word of bash, which adds the port that it knows."""
    escaped = re.sub(r'(["$`\\])', r"\\\1", command)
    return f'"{escaped} --master_port $MASTER_PORT"'


def _is_yaml(word: str) -> bool:
    return Path(word).suffix in (".yaml", ".yml")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orpo-ds submit",
        usage="orpo-ds submit [options] run.yaml [--any_field value …]",
        description="Submit a run to SLURM. Other options, as --name=value, go to sbatch.",
        allow_abbrev=False,
    )

    def add(name: str, text: str, **keywords: Any) -> None:
        parser.add_argument(name, help=text, **keywords)

    add("--nodes", "machines (default: %(default)s)", type=int, default=1)
    add("--gpus-per-node", "GPUs, and so ranks, on each (default: %(default)s)", type=int, default=1)
    add("--time", "limit of one start (default: %(default)s); the job comes back", default="04:00:00")
    add(
        "--task-per",
        "gpu: srun starts the ranks (default); node: DeepSpeed's launcher does",
        choices=["gpu", "node"],
        default="gpu",
    )
    add("--partition", "of SLURM")
    add("--account", "of SLURM")
    add("--qos", "of SLURM")
    add("--job-name", "default: %(default)s", default="orpo")
    add("--log", "SLURM's pattern for the log (default: slurm-%%j.log)")
    add("--seeds", "an array of runs over seeds, such as 1-5 or 1,2,7", metavar="ARRAY")
    add("--container", "an Apptainer image (x.sif), or one for enroot through pyxis", metavar="IMAGE")
    add(
        "--signal-s",
        "seconds before the limit at which the run saves (default: %(default)s)",
        type=int,
        default=SIGNAL_SECONDS,
    )
    add(
        "--max-restarts-without-progress",
        "end after N restarts in a row that brought no new checkpoint (default: %(default)s)",
        type=int,
        default=DEFAULT_LIMIT,
        metavar="N",
    )
    add("--gpu", "of the nodes, by memory or name, for the estimate (default: %(default)s)", default="80GB")
    add("--no-estimate", "submit without asking whether the run fits", action="store_true")
    add("--no-preflight", "start without checking the nodes", action="store_true")
    add("--print-only", "print the script and submit nothing", action="store_true")
    add("--no-follow", "do not follow the log", action="store_true")
    return parser
