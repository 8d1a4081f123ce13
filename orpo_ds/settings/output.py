"""Rows of the fields about what a run leaves behind: checkpoints, logs, dashboards, the hub."""

from __future__ import annotations

from orpo_ds.settings.claims import Claim, Group, Honoured, Mapped, Refused

_CHECKPOINTS: tuple[Claim, ...] = (
    Honoured(
        "output_dir",
        "Unset: `trainer_output`.",
        "tests/test_config.py::test_the_file_may_name_model_and_data",
    ),
    Honoured(
        "overwrite_output_dir",
        "Moves an earlier run in `output_dir` aside.",
        "tests/checkpoint/test_output_dir.py::test_overwrite_moves_results_aside_and_leaves_the_users_files",
    ),
    Honoured(
        "save_strategy",
        "`best`: whenever an evaluation is better than ever.",
        "tests/test_best.py::test_save_strategy_best",
    ),
    Honoured("save_steps", "Below 1, a share of all steps.", "tests/test_trainer.py::test_strategies"),
    Honoured(
        "save_total_limit",
        "Keeps the newest that are whole.",
        "tests/checkpoint/test_store.py::test_retention_keeps_the_newest_and_the_best",
    ),
    Refused("save_safetensors", "a model is written as safetensors, never as a pickle", "Leave it at True."),
    Refused(
        "save_on_each_node",
        "a checkpoint is one folder that all ranks write together and that is verified as a whole",
        "Put `output_dir` on a file system that all hosts share.",
    ),
    Honoured(
        "save_only_model",
        "A checkpoint is a model folder with a manifest; to resume from it is refused.",
        "tests/test_best.py::test_save_only_model",
    ),
    Honoured(
        "enable_jit_checkpoint",
        "On by default: SIGTERM or SIGUSR1 to any rank saves a checkpoint after the step and ends all ranks with "
        "status 85. Off: they do what they do to any program.",
        "tests/faults/test_preemption.py::test_switched_off_a_signal_does_what_it_does_to_any_program",
    ),
    Honoured(
        "resume_from_checkpoint",
        "True: the newest good one in `output_dir`; `auto`: the same, or a new run where none is; a path: that one.",
        "tests/test_cli.py::test_resume_by_flag",
    ),
    Honoured(
        "ignore_data_skip",
        "A resume begins the epoch under way again; otherwise it goes on with the batch after the checkpoint's.",
        "tests/test_best.py::test_ignore_data_skip_begins_the_epoch_again",
    ),
    Honoured(
        "restore_callback_states_from_checkpoint",
        "A resume brings callbacks with a state (`ExportableState`) back to where they were.",
        "tests/test_best.py::test_states_of_callbacks_are_restored",
    ),
)

_LOGS: tuple[Claim, ...] = (
    Honoured("logging_strategy", "", "tests/test_trainer.py::test_strategies"),
    Honoured("logging_steps", "Below 1, a share of all steps.", "tests/test_trainer.py::test_strategies"),
    Honoured("logging_first_step", "", "tests/test_trainer.py::test_strategies"),
    Mapped(
        "logging_nan_inf_filter",
        "",
        "There is nothing to filter: a loss that is not finite ends the run before the weights change.",
    ),
    Honoured(
        "log_level",
        "Of the messages of transformers and orpo_ds on the main process; `passive` leaves it as it is.",
        "tests/monitor/test_verbosity.py::test_levels_of_main_and_other_ranks",
    ),
    Honoured(
        "log_level_replica",
        "The same on the other ranks.",
        "tests/monitor/test_verbosity.py::test_levels_of_main_and_other_ranks",
    ),
    Honoured(
        "log_on_each_node",
        "Whether the first rank of each further host speaks as the main process does. Figures are written once.",
        "tests/monitor/test_verbosity.py::test_levels_of_main_and_other_ranks",
    ),
    Honoured(
        "disable_tqdm",
        "No progress bars, plain lines instead.",
        "tests/test_progress.py::test_disable_tqdm_leaves_no_bar",
    ),
    Honoured(
        "include_num_input_tokens_seen",
        "Logs `num_input_tokens_seen`, over all ranks and resumes: `non_padding`, or with the padding (`all`, True). A "
        "shared trunk of packed rows counts once, as it is computed once.",
        "tests/test_trainer.py::test_tokens_seen",
    ),
    Mapped("include_tokens_per_second", "", "`tokens_per_s` is always logged."),
    Mapped("skip_memory_metrics", "", "`peak_memory_mib` is logged each time, on GPUs and CPUs."),
)

_DASHBOARDS: tuple[Claim, ...] = (
    Honoured(
        "report_to",
        "W&B and all other dashboards of transformers, in the background; one that is not installed is an error.",
        "tests/monitor/test_report.py::test_report_to_is_read_as_transformers_reads_it",
    ),
    Honoured(
        "run_name",
        "Name of the run in the dashboards.",
        "tests/monitor/test_wandb.py::test_the_run_is_where_and_what_one_asked_for",
    ),
    Honoured(
        "logging_dir",
        "TensorBoard's folder, before `TENSORBOARD_LOGGING_DIR`. Unset: `runs/<time>` in `output_dir`.",
        "tests/monitor/test_report.py::test_tensorboard_has_the_metrics_and_no_token",
    ),
    Honoured(
        "wandb_runs",
        "One W&B run for the job, or one for each node in one group.",
        "tests/monitor/test_report.py::test_each_node_has_a_run_of_its_own",
    ),
    Honoured(
        "log_gradients_by_layer",
        "Adds `grad_norm_by_layer/<layer>`, exact under every ZeRO stage.",
        "tests/monitor/test_gradients.py::test_one_rank_logs_autograds_norms",
    ),
    Honoured(
        "project",
        "Of W&B, unless `WANDB_PROJECT` is set, and of Trackio.",
        "tests/monitor/test_wandb.py::test_the_run_is_where_and_what_one_asked_for",
    ),
    *(
        Honoured(
            name,
            "Of Trackio, whose callback is transformers' own; without `report_to='trackio'` an error.",
            "tests/settings/test_checks.py::test_trackios_settings_need_trackio",
        )
        for name in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    ),
)

_HUB: tuple[Claim, ...] = (
    Honoured(
        "push_to_hub",
        "Uploads in the background; a hub that fails is spoken of once.",
        "tests/test_hub.py::test_what_each_strategy_uploads",
    ),
    Honoured(
        "hub_model_id",
        "Unset: the name of `output_dir`, under the user's own name.",
        "tests/test_hub.py::test_a_push_by_hand",
    ),
    Honoured(
        "hub_strategy",
        "One commit a save; `end`: by `save_model` and `push_to_hub` only.",
        "tests/test_hub.py::test_what_each_strategy_uploads",
    ),
    Honoured(
        "hub_token",
        "Better in HF_TOKEN or from `hf auth login`; never written down.",
        "tests/test_hub.py::test_no_token_in_anything_written_or_uploaded",
    ),
    Honoured(
        "hub_private_repo",
        "Of a repository that is new.",
        "tests/test_hub.py::test_a_push_by_hand",
    ),
    Honoured(
        "hub_always_push",
        "Off: a save during an upload is not uploaded, but the last model always is.",
        "tests/test_hub.py::test_training_does_not_wait_for_the_hub",
    ),
    Honoured(
        "hub_revision",
        "A branch, made if it is not there.",
        "tests/test_hub.py::test_a_push_by_hand",
    ),
    Mapped(
        "push_to_hub_model_id", "hub_model_id", "With `push_to_hub_organization` in front, if that is set."
    ),
    Mapped(
        "push_to_hub_organization",
        "hub_model_id",
        "`organization/model`; without `push_to_hub_model_id`, the name of `output_dir`.",
    ),
    Mapped("push_to_hub_token", "hub_token", "The same token."),
)

GROUPS = (
    Group("Checkpoints and the output folder", _CHECKPOINTS),
    Group("Logs", _LOGS),
    Group("Dashboards", _DASHBOARDS),
    Group("The hub", _HUB),
)
