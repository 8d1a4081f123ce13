"""Checkpoints: atomic save, manifest, verify, resume, retention.

The trainer uses it like this, on all ranks:

    resume_from = resolve_resume(args.resume_from_checkpoint, args.output_dir, ranks=ranks)   # or None
    claim_output_dir(args.output_dir, resume_from=resume_from, overwrite_output_dir=..., ranks=ranks)
    store = CheckpointStore(args.output_dir, save_total_limit=args.save_total_limit, ranks=ranks)
    store.clean_up()
    manifest = check_resume(resume_from, metadata)
    load_engine(engine, resume_from)
    load_rank_state(resume_from, ranks)
    ...
    store.save(write, metadata)          # write(folder): save_engine, save_rank_state, trainer_state.json,
    ... store.prune(keep=[best])

`check_engine`, `save_engine` and `load_engine` are in `engine_state`, the one module here that imports
DeepSpeed.
"""

from orpo_ds.checkpoint.manifest import CheckpointMetadata, Manifest, read_manifest, verify
from orpo_ds.checkpoint.output_dir import claim_output_dir
from orpo_ds.checkpoint.rank_state import load_rank_state, save_rank_state
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
    "verify",
]
