"""From `resume_from_checkpoint` to a checkpoint that may be loaded, or an error that says why there is none.

DeepSpeed starts from scratch, with one line in the log, when it finds nothing to load. A run that was asked
to continue and cannot is an error here. Only `auto` may start from nothing, for a chain of jobs: its first start and
its restarts are the same command.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from orpo_ds.checkpoint.manifest import CheckpointMetadata, Manifest, plain_config, read_manifest, verify
from orpo_ds.checkpoint.ranks import Ranks, on_main
from orpo_ds.checkpoint.store import CheckpointStore, numbered_folders

logger = logging.getLogger(__name__)

AUTO = "auto"  # continue if there is a checkpoint, else start

# What a run must share with its checkpoint, and what to do about it.
COMPARED_BY_NAME = {
    "dataset_fingerprint": "the training data, or how it is tokenised, is not the same",
    "seed": "the order of the data would not be the same",
}
# Their product with the data-parallel ranks is the global batch.
BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")

# Fields of the config whose change makes the rest of the run another run. The learning rate, for one, would
# come out of the checkpoint's schedule and the new value would be ignored in silence.
# fmt: off
REFUSED_FIELDS = frozenset({
    "adam_beta1", "adam_beta2", "adam_epsilon", "beta", "bf16", "chat_template_path", "data_seed",
    "dataloader_drop_last", "dataset_shuffle_buffer", "disable_dropout", "fp16", "is_encoder_decoder",
    "label_pad_token_id",
    "label_smoothing_factor", "learning_rate", "lr_scheduler_kwargs", "lr_scheduler_type",
    "max_completion_length", "max_grad_norm", "max_length", "max_prompt_length", "neftune_noise_alpha",
    "nll_on_prompt", "optim", "optim_args", "optim_target_modules", "padding_value", "router_balance",
    "tensor_parallel_size", "train_sampling_strategy", "truncation_mode", "unusable_rows", "warmup_steps",
    "weight_decay",
})
# fmt: on

# Fields whose change leaves every number of the training as it is.
# fmt: off
HARMLESS_FIELDS = frozenset({
    "batch_eval_metrics", "bf16_full_eval", "dataloader_in_order", "dataloader_multiprocessing_context",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataset_cache_dir", "dataset_num_proc", "ddp_backend", "ddp_timeout",
    "debug", "disable_tqdm", "do_eval", "do_predict", "do_train", "enable_jit_checkpoint",
    "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches", "eval_on_start", "eval_steps",
    "eval_strategy", "eval_use_gather_object", "fp16_full_eval", "generate_during_eval",
    "generate_max_new_tokens", "generate_num_prompts", "greater_is_better", "hub_always_push",
    "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token", "ignore_data_skip",
    "include_for_metrics", "include_num_input_tokens_seen", "label_names", "length_column_name",
    "load_best_model_at_end", "local_rank", "log_gradients_by_layer", "log_level", "log_level_replica",
    "log_on_each_node", "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy",
    "metric_for_best_model", "output_dir", "overwrite_output_dir", "parallelism_config",
    "per_device_eval_batch_size", "prediction_loss_only", "project", "push_to_hub", "remove_unused_columns",
    "report_to", "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "run_name",
    "save_on_each_node", "save_only_model", "save_steps", "save_strategy", "save_total_limit",
    "skip_memory_metrics", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
    "wandb_runs",
})
# fmt: on


def resolve_resume(
    resume_from_checkpoint: bool | str | Path | None, output_dir: str | Path, *, ranks: Ranks
) -> Path | None:
    """The checkpoint folder to continue from, every file of it verified. Collective.

    Args:
        resume_from_checkpoint: True (or "true", as a command line says it) for the newest good checkpoint in
            `output_dir`; newer broken ones are skipped with a warning that names them. "auto" for the same, or
            for none where nothing was saved yet. Or the path of one checkpoint.
        output_dir: the run's output folder.
        ranks: this rank and its collective.

    Returns:
        The folder, the same on every rank; None when no resume was asked for (False, None, "false") or there is
        nothing yet ("auto").

    Raises:
        ValueError: on all ranks, when there is nothing to continue from, or the named checkpoint is not good;
            says which files are wrong.
    """
    output_dir = Path(output_dir)
    wish = str(resume_from_checkpoint).lower()
    if wish in ("false", "none"):
        return None
    if wish in ("true", AUTO):
        store = CheckpointStore(output_dir, save_total_limit=None, ranks=ranks)
        store.clean_up()  # may bring back a checkpoint that was being replaced when the run died
        newest = store.latest_good()
        if newest is None and wish == AUTO and not on_main(ranks, lambda: numbered_folders(output_dir)):
            return None
        if newest is None:
            raise ValueError(_nothing_to_resume(output_dir, ranks))
        return newest
    folder = Path(str(resume_from_checkpoint))
    if not on_main(ranks, folder.is_dir):
        raise ValueError(f"resume_from_checkpoint={str(folder)!r}: there is no such folder")
    problems = verify(folder, ranks)
    if problems:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} is not a good checkpoint:\n  "
            + "\n  ".join(problems)
            + "\nUse resume_from_checkpoint=True to continue from the newest good one in output_dir."
        )
    return folder


def _nothing_to_resume(output_dir: Path, ranks: Ranks) -> str:
    found = on_main(ranks, lambda: [folder.name for folder in numbered_folders(output_dir)])
    state = f"all are broken ({', '.join(found)}; see the warnings above)" if found else "there is none"
    return (
        f"resume_from_checkpoint=True, but no good checkpoint is in {output_dir}: {state}. "
        "Start without resume_from_checkpoint to train from the beginning."
    )


def check_resume(folder: Path, current: CheckpointMetadata) -> Manifest:
    """Compare a checkpoint with the run that is about to continue it; return its manifest.

    `current.step` and `current.epoch` are not looked at. Config fields that only round differently
    (micro-batch size, tile sizes, ...) or change the length of the schedule are warned about: the run goes
    on, not bit for bit. So it does on other ranks and under another ZeRO stage; where only the ranks changed, the
    global batch stays the checkpoint's, which the caller sees to (`manifest.metadata.global_batch_size`).

    Raises:
        ValueError: names every value that differs, the checkpoint's and this run's.
    """
    manifest = read_manifest(folder)
    saved = manifest.metadata
    if saved.config.get("save_only_model"):
        raise ValueError(
            f"{folder} was written with save_only_model=True: it holds the model, and not the optimizer's state, the "
            "schedule and the random generators that a resume needs. Start a new run with model_name_or_path="
            f"{str(folder)!r}, or continue from a checkpoint that was written without save_only_model."
        )
    differences = [
        f"{name}: {before!r} in the checkpoint, {now!r} in this run ({advice})"
        for name, advice in COMPARED_BY_NAME.items()
        if (before := getattr(saved, name)) != (now := getattr(current, name))
    ]
    if saved.global_batch_size != current.global_batch_size:
        differences += _batch_difference(saved, current)
    before_all, now_all = _flat(saved.config), _flat(plain_config(current.config))
    for name in sorted(before_all.keys() & now_all.keys()):
        before, now = before_all[name], now_all[name]
        field = name.partition(".")[0]
        if before == now or field in COMPARED_BY_NAME or field in HARMLESS_FIELDS:
            continue
        if field in REFUSED_FIELDS:
            differences.append(f"{name}: {before!r} in the checkpoint, {now!r} in this run")
        else:
            logger.warning(
                "%s: %r in the checkpoint, %r in this run: it goes on, but not bit for bit", name, before, now
            )
    if differences:
        raise ValueError(
            f"{folder} belongs to a run with other settings, so this one cannot continue it:\n  "
            + "\n  ".join(differences)
            + "\nSet them as they were, or start a new run with model_name_or_path set to the model so far."
        )
    return manifest


def _batch_difference(saved: CheckpointMetadata, current: CheckpointMetadata) -> list[str]:
    """Why the global batch cannot stay as it was; [] where it can, because only the number of ranks changed."""
    before, now = ([one.config.get(name) for name in BATCH_FIELDS] for one in (saved, current))
    if before == now:
        return []
    pairs = saved.global_batch_size
    kept = ", ".join(f"{name}={value}" for name, value in zip(BATCH_FIELDS, before, strict=True))
    return [
        f"global_batch_size: {pairs} in the checkpoint, {current.global_batch_size} in this run (set {kept} as they "
        f"were: on any number of ranks the run then goes on with {pairs} pairs a step)"
    ]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted names, so that a difference within the DeepSpeed JSON is named exactly."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
