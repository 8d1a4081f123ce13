"""Rows of the fields that decide what is learned: ORPO and its data, the length of the run, optimizer, precision."""

from __future__ import annotations

from orpo_ds.settings.claims import Claim, Group, Honoured, Mapped, Refused

_ORPO: tuple[Claim, ...] = (
    Honoured(
        "beta",
        "Weight of the odds-ratio term (the paper's lambda).",
        "tests/test_cli.py::test_flags_and_file_both_count",
    ),
    Honoured(
        "nll_on_prompt",
        "Whether the prompt's tokens count in the nll.",
        "tests/data/test_feed.py::test_nll_on_responses_only",
    ),
    Honoured(
        "router_balance",
        "Whether experts are balanced over the global batch or over each micro-step.",
        "tests/test_experts.py::test_router_balance",
    ),
    Honoured(
        "disable_dropout",
        "Sets the model's own dropout to 0; that of LoRA stays.",
        "tests/test_prepare.py::test_dropout_of_the_model_and_of_lora",
    ),
    Honoured(
        "max_length", "Tokens of prompt and response together.", "tests/data/test_truncate.py::test_contract"
    ),
    Honoured(
        "max_prompt_length",
        "Tokens that the prompt of a pair that is too long may keep.",
        "tests/data/test_truncate.py::test_contract",
    ),
    Honoured(
        "max_completion_length",
        "Tokens of a response of an encoder-decoder model.",
        "tests/data/test_tokenize.py::test_encoder_decoder_ids_are_trls",
    ),
    Honoured(
        "truncation_mode",
        "Which end of a prompt survives.",
        "tests/data/test_truncate.py::test_the_end_named_by_the_mode_survives",
    ),
    Honoured(
        "unusable_rows",
        "Rows that cannot be trained on stop the run, or are dropped and counted.",
        "tests/data/test_token_dataset.py::test_unusable_rows_are_dropped_on_request",
    ),
    Honoured(
        "padding_value",
        "Token id of the padding, in the padded layout.",
        "tests/test_layout.py::test_padding_is_the_token_that_was_named",
    ),
    Honoured(
        "label_pad_token_id",
        "Label of the prompt's tokens, in what `compute_metrics` is given.",
        "tests/test_predictions.py::test_the_label_of_a_prompt",
    ),
    Honoured(
        "is_encoder_decoder",
        "Unset, the model's config says; what contradicts it is an error.",
        "tests/test_prepare.py::test_a_model_of_the_other_kind",
    ),
    Honoured(
        "model_init_kwargs",
        "Keywords of `from_pretrained` for a model given by name.",
        "tests/test_prepare.py::test_keywords_reach_from_pretrained",
    ),
    Honoured(
        "trust_remote_code",
        "Off unless asked for.",
        "tests/test_prepare.py::test_code_of_a_model_folder_runs_only_when_asked_for",
    ),
    Honoured(
        "chat_template_path",
        "A Jinja file, or the folder of a tokenizer.",
        "tests/model/test_load.py::test_the_chat_template_of_a_path_is_used",
    ),
    Honoured(
        "dataset_num_proc",
        "Processes that tokenise.",
        "tests/data/test_token_dataset.py::test_several_processes_make_the_same",
    ),
    Honoured(
        "dataset_cache_dir",
        "Where tokenised data is kept.",
        "tests/test_cli.py::test_a_second_start_does_not_tokenise_again",
    ),
    Honoured(
        "dataset_shuffle_buffer",
        "Rows of a streamed dataset that are held in memory and shuffled with each other.",
        "tests/test_prepare_data.py::test_the_settings_reach_the_stream",
    ),
    Honoured(
        "layout",
        "Packed, padded, or what the check before step 0 finds.",
        "tests/distributed/test_invariance.py::test_loss_metrics_and_gradients",
    ),
    Honoured(
        "max_tokens_per_micro_batch",
        "Most tokens that a rank pushes through the model at once.",
        "tests/distributed/test_invariance.py::test_a_tight_budget_means_more_micro_steps",
    ),
    Honoured(
        "logits_cache_mib",
        "MiB of logits kept from forward to backward.",
        "tests/loss/test_token_logps.py::test_number_of_matrix_products",
    ),
)

_STEPS: tuple[Claim, ...] = (
    Honoured(
        "per_device_train_batch_size",
        "Pairs a rank and accumulation step; the global batch is this x accumulation x ranks.",
        "tests/test_config.py::test_batch_sizes",
    ),
    Mapped("per_gpu_train_batch_size", "per_device_train_batch_size", "The same number."),
    Honoured(
        "gradient_accumulation_steps",
        "Multiplies the global batch; loss and gradient are those of one bigger batch.",
        "tests/test_trainer.py::test_accumulation_equals_a_bigger_batch",
    ),
    Honoured("num_train_epochs", "May be a fraction.", "tests/test_trainer.py::test_strategies"),
    Honoured("max_steps", "Above 0, wins over the epochs.", "tests/test_trainer.py::test_strategies"),
    Honoured(
        "auto_find_batch_size",
        "Halves `max_tokens_per_micro_batch` before the first step until the longest pairs fit in memory on all ranks. "
        "The global batch, and so every number, stays.",
        "tests/test_rehearsal.py::test_the_budget_is_halved_until_it_fits",
    ),
    Honoured(
        "dry_run",
        "Tries the largest micro-batch, forward, backward and update, prints peak memory and time and ends with status "
        "0; `output_dir` is not touched.",
        "tests/test_dry_run.py::test_the_largest_micro_batch_is_tried_and_nothing_is_written",
    ),
    Refused(
        "average_tokens_across_devices",
        "the loss is always normalised over the tokens of the whole global batch",
        "Leave it at True.",
    ),
    Honoured(
        "seed",
        "Of the model's initialisation, of dropout, and of the order of the rows.",
        "tests/test_plan.py::test_seeds",
    ),
    Honoured(
        "data_seed",
        "Of the order of the rows, where it is to differ from `seed`.",
        "tests/test_plan.py::test_seeds",
    ),
    Honoured(
        "full_determinism",
        "transformers' `enable_full_determinism`: deterministic kernels, at the price of speed.",
        "tests/model/test_compiled.py::test_full_determinism",
    ),
    Honoured(
        "train_sampling_strategy",
        "`random` shuffles anew in each epoch, `sequential` keeps the dataset's order, `group_by_length` puts pairs of "
        "similar length together (packed rows have no padding to save).",
        "tests/test_plan.py::test_sampling_strategies",
        refuses={
            "batch_rebalance": "the tokens of a batch are balanced over the ranks always. Use 'random'.",
        },
    ),
    Mapped("group_by_length", "train_sampling_strategy", "`group_by_length`."),
    Refused(
        "length_column_name",
        "the lengths of all pairs are known from tokenising, so no column is read",
        "Leave it out.",
    ),
)

_DURING_BACKWARD = (
    "it updates weights during the backward pass, which ZeRO's shards do not allow. Use 'adamw_torch'."
)

_OPTIMIZER: tuple[Claim, ...] = (
    Honoured("learning_rate", "The peak.", "tests/test_trainer.py::test_learning_rates"),
    Honoured(
        "lr_scheduler_type",
        "All schedules of transformers.",
        "tests/test_trainer.py::test_schedules_are_those_of_transformers",
    ),
    Honoured(
        "lr_scheduler_kwargs",
        "Keywords of the schedule.",
        "tests/test_trainer.py::test_schedules_are_those_of_transformers",
    ),
    Honoured("warmup_steps", "Below 1, a share of all steps.", "tests/test_trainer.py::test_learning_rates"),
    Mapped("warmup_ratio", "warmup_steps", "A share of all steps, as `warmup_steps` below 1."),
    Honoured(
        "optim",
        "Optimizers of transformers, some of which need a package of their own. `adamw_torch` is fused, as "
        "`adamw_torch_fused` is, and becomes DeepSpeed's CPU AdamW where its state is offloaded.",
        "tests/test_trainer.py::test_optimizers_by_name",
        refuses={
            **dict.fromkeys(("lomo", "adalomo"), _DURING_BACKWARD),
            **dict.fromkeys(
                (
                    "galore_adamw_layerwise",
                    "galore_adamw_8bit_layerwise",
                    "galore_adafactor_layerwise",
                    "apollo_adamw_layerwise",
                ),
                _DURING_BACKWARD,
            ),
            **dict.fromkeys(
                ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
                "it swaps the weights for each evaluation and save, which ZeRO's partitions do not. Use 'adamw_torch'.",
            ),
            "galore_adamw_8bit": "its state of 8 bits needs a GPU, and has not run here. Use 'galore_adamw'.",
            "adamw_torch_xla": "DeepSpeed does not run on TPUs. Use 'adamw_torch'.",
        },
    ),
    Mapped("adafactor", "optim", "`adafactor`."),
    Honoured(
        "optim_args",
        "Keywords of the optimizer, as `key=value,key=value`; one that it does not read is an error.",
        "tests/test_engine.py::test_optim_args",
    ),
    Honoured(
        "optim_target_modules",
        "Layers whose gradients `galore_adamw`, `galore_adafactor` and `apollo_adamw` project: names, a pattern or "
        "all-linear. For ZeRO-0 in fp32; elsewhere DeepSpeed hands an optimizer flat pieces, which is an error.",
        "tests/test_low_rank.py::test_galore_moves_a_matrix_within_the_gradients_first_directions",
    ),
    Honoured("adam_beta1", "", "tests/test_trainer.py::test_adamw_takes_the_step_of_the_paper"),
    Honoured("adam_beta2", "", "tests/test_trainer.py::test_adamw_takes_the_step_of_the_paper"),
    Honoured("adam_epsilon", "", "tests/test_trainer.py::test_adamw_takes_the_step_of_the_paper"),
    Honoured(
        "weight_decay",
        "Biases and norms are not decayed, as in transformers.",
        "tests/test_engine.py::test_decayed_parameters_are_those_of_transformers",
    ),
    Honoured(
        "max_grad_norm",
        "DeepSpeed clips the norm of the global gradient; 0 clips nothing.",
        "tests/test_trainer.py::test_the_gradient_is_clipped",
    ),
    Refused(
        "label_smoothing_factor",
        "ORPO's loss is of log-probabilities of the tokens as they are",
        "Leave it out; `beta` weighs the two terms.",
    ),
    Honoured(
        "neftune_noise_alpha",
        "Noise on the embeddings in training, by the length of a token's own pair; a trunk's is one draw for both "
        "branches.",
        "tests/model/test_neftune.py::test_noise_is_bounded_by_the_length_of_the_pair",
    ),
)

_PRECISION: tuple[Claim, ...] = (
    Honoured(
        "bf16",
        "Unset, the hardware decides: bfloat16 where it is native, else float32.",
        "tests/test_config.py::test_bf16_is_settled_by_the_json_or_the_hardware",
    ),
    Honoured(
        "fp16", "With a loss scale of DeepSpeed's.", "tests/test_trainer.py::test_fp16_finds_its_loss_scale"
    ),
    Mapped("half_precision_backend", "", "Mixed precision is DeepSpeed's own, by `bf16` or `fp16`."),
    Mapped("fp16_backend", "", "Mixed precision is DeepSpeed's own, by `bf16` or `fp16`."),
    Refused("fp16_opt_level", "it belongs to NVIDIA Apex, which is not used", "Use `fp16` or `bf16`."),
    Honoured(
        "tf32",
        "Turns TF32 products on or off; on, it needs a GPU that has them.",
        "tests/test_config.py::test_tf32_on_a_gpu",
    ),
    Honoured(
        "bf16_full_eval",
        "An evaluation runs in the precision of the training, so it needs `bf16`; without, it is an error.",
        "tests/test_evaluation.py::test_an_evaluation_in_half_precision",
    ),
    Honoured(
        "fp16_full_eval",
        "An evaluation runs in the precision of the training, so it needs `fp16`; without, it is an error.",
        "tests/test_evaluation.py::test_an_evaluation_in_half_precision",
    ),
    Honoured(
        "gradient_checkpointing",
        "Recomputes activations in the backward pass. The same setting as `activation_checkpointing`.",
        "tests/test_trainer.py::test_gradient_checkpointing_changes_nothing",
    ),
    Honoured(
        "activation_checkpointing",
        "transformers 5's name of `gradient_checkpointing`.",
        "tests/test_prepare.py::test_checkpointing_by_both_names",
    ),
    Honoured(
        "gradient_checkpointing_kwargs",
        "The same setting as `activation_checkpointing_kwargs`.",
        "tests/test_prepare.py::test_checkpointing_by_both_names",
    ),
    Honoured(
        "activation_checkpointing_kwargs",
        "Of `torch.utils.checkpoint`, not reentrant unless said; and `every_n_layers`, `offload`.",
        "tests/test_prepare.py::test_checkpointing_by_both_names",
    ),
    Honoured(
        "mlp_tile_tokens",
        "Tokens that an MLP computes at once ([long-context.md](long-context.md)).",
        "tests/model/test_tiled_mlp.py::test_loss_and_gradients_are_the_same",
    ),
    Honoured(
        "torch_compile",
        "Compiles the forward of the backbone; packed attention and loss stay outside of the graphs.",
        "tests/model/test_compiled.py::test_compiled_numbers_are_the_same",
    ),
    Honoured(
        "torch_compile_backend",
        "Turns `torch_compile` on.",
        "tests/model/test_compiled.py::test_compiled_numbers_are_the_same",
    ),
    Honoured(
        "torch_compile_mode",
        "Turns `torch_compile` on.",
        "tests/model/test_compiled.py::test_the_mode_reaches_the_compiler",
    ),
    Mapped("torchdynamo", "torch_compile_backend", "The same name."),
    Refused("jit_mode_eval", "it traced models for inference with IPEX", "Leave it out."),
    Honoured(
        "use_liger_kernel",
        "Liger's kernels for layers, never for the loss.",
        "tests/model/test_compiled.py::test_liger_gets_layers_and_no_loss",
    ),
    Honoured(
        "liger_kernel_config",
        "Which kernels; its losses are refused.",
        "tests/model/test_compiled.py::test_liger_gets_layers_and_no_loss",
    ),
    Refused(
        "use_cache",
        "a cache of keys and values serves generation only and costs memory in training",
        "Leave it out; the saved model has the cache on again.",
    ),
    Honoured(
        "torch_empty_cache_steps",
        "Steps after which the device's cached memory is given back.",
        "tests/test_callbacks.py::test_the_cache_is_emptied_every_so_many_steps",
    ),
)

GROUPS = (
    Group("ORPO and its data", _ORPO),
    Group("Batches, steps and seeds", _STEPS),
    Group("Optimizer and schedule", _OPTIMIZER),
    Group("Precision, speed and memory", _PRECISION),
)
