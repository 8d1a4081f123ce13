"""Checkpoints: atomic save, manifest, verify, resume, retention.

The trainer uses it like this, on all ranks:

    with sole_job(output_dir, ranks): ...       # all of what follows
    source = resolve_resume(args.resume_from_checkpoint, output_dir, ranks=ranks)      # or None
    claim_output_dir(output_dir, resume_from=source, overwrite_output_dir=False, ranks=ranks)
    store = CheckpointStore(output_dir, save_total_limit=3, ranks=ranks)
    store.clean_up()
    check_resume(source, metadata)
    load_engine(engine, source, scheduler=scheduler)
    load_rank_state(source, ranks)
    ...
    store.save(write, metadata)     # write(folder): save_engine, save_rank_state, trainer_state.json
    store.prune(keep=[best])

`check_engine`, `save_engine` and `load_engine` are in `engine_state`. It, `shards` (the files, by parameter) and
`elastic` (a checkpoint of other ranks or another ZeRO stage) are the modules that know DeepSpeed.
"""

from orpo_ds.checkpoint.lock import sole_job
from orpo_ds.checkpoint.manifest import CheckpointMetadata, Manifest, read_manifest, verify
from orpo_ds.checkpoint.output_dir import claim_output_dir
from orpo_ds.checkpoint.rank_state import load_rank_state, save_rank_state, seed_rank_anew
from orpo_ds.checkpoint.ranks import Ranks, job_ranks, one_rank
from orpo_ds.checkpoint.resume import check_resume, resolve_resume
from orpo_ds.checkpoint.store import CheckpointSaveError, CheckpointStore

__all__ = [
    "CheckpointMetadata",
    "CheckpointSaveError",
    "CheckpointStore",
    "Manifest",
    "Ranks",
    "check_resume",
    "claim_output_dir",
    "job_ranks",
    "load_rank_state",
    "one_rank",
    "read_manifest",
    "resolve_resume",
    "save_rank_state",
    "seed_rank_anew",
    "sole_job",
    "verify",
]
