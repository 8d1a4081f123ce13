"""What a run will need, before it has a machine: `orpo-ds estimate`, and as functions.

    answer = estimate_run(["--config", "run.yaml"], parse_cluster("8x80GB", nodes=4))
    answer.fits, answer.text

The story in files: `hardware.py` what a cluster is made of; `shapes.py` the model without weights; `replay.py` its
forward and backward pass on shapes; `states.py` what DeepSpeed holds; `memory.py` the peak of a rank; `workload.py`
the tokens of a step; `timing.py` its seconds and bytes; `plans.py` all of it for one run under each preset;
`report.py` and `command.py` what is printed. `docs/scaling.md` says what was measured and what is computed.
"""

from orpo_ds.estimate.command import Answer, estimate_run
from orpo_ds.estimate.hardware import Cluster, Gpu, parse_cluster
from orpo_ds.estimate.plans import Estimate, Estimator
from orpo_ds.estimate.workload import Pairs

__all__ = [
    "Answer",
    "Cluster",
    "Estimate",
    "Estimator",
    "Gpu",
    "Pairs",
    "estimate_run",
    "parse_cluster",
]
