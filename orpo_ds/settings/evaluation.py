"""Rows of the fields about evaluations: when they happen, what they compute, which checkpoint was best."""

from __future__ import annotations

from orpo_ds.settings.claims import Claim, Group, Honoured, Mapped, Refused

_WHEN: tuple[Claim, ...] = (
    Honoured("eval_strategy", "", "tests/test_trainer.py::test_strategies"),
    Mapped("evaluation_strategy", "eval_strategy", "The same word."),
    Honoured("eval_steps", "Below 1, a share of all steps.", "tests/test_trainer.py::test_strategies"),
    Honoured(
        "eval_delay",
        "Steps or epochs before the first evaluation.",
        "tests/test_events.py::test_events_are_those_of_transformers",
    ),
    Honoured("eval_on_start", "Evaluates before the first step.", "tests/test_trainer.py::test_strategies"),
    Honoured(
        "per_device_eval_batch_size",
        "Memory and time of an evaluation; the result does not depend on it.",
        "tests/test_evaluation.py::test_evaluation_is_exact_on_one_rank",
    ),
    Mapped("per_gpu_eval_batch_size", "per_device_eval_batch_size", "The same number."),
)

_WHAT: tuple[Claim, ...] = (
    Honoured(
        "prediction_loss_only",
        "No predictions are collected, and `compute_metrics` is not called.",
        "tests/test_predictions.py::test_loss_only",
    ),
    Honoured(
        "eval_accumulation_steps",
        "Batches whose predictions stay on the device before they go to the host. Unset: one.",
        "tests/test_predictions.py::test_accumulation_on_the_device",
    ),
    Honoured(
        "include_for_metrics",
        "`inputs`: token ids; `loss`: the loss of every pair by itself.",
        "tests/test_predictions.py::test_preprocess_sees_the_logits_of_the_model",
    ),
    Mapped("include_inputs_for_metrics", "include_for_metrics", "`inputs` is added to the list."),
    Honoured(
        "batch_eval_metrics",
        "`compute_metrics` is called after each batch, with `compute_result=True` after the last.",
        "tests/test_predictions.py::test_metrics_batch_by_batch",
    ),
    Honoured(
        "eval_do_concat_batches",
        "Off: predictions are lists with an array a batch.",
        "tests/test_predictions.py::test_batches_apart",
    ),
    Honoured(
        "eval_use_gather_object",
        "`preprocess_logits_for_metrics` may return other things than tensors.",
        "tests/test_predictions.py::test_objects_need_to_be_asked_for",
    ),
    Honoured(
        "generate_during_eval",
        "Answers to a few prompts, before the training and at each evaluation: a table in W&B, TensorBoard or the log, "
        "and `answers.jsonl`.",
        "tests/test_answers.py::test_answers_are_those_of_the_model_at_each_step",
    ),
    Honoured(
        "generate_num_prompts",
        "Of each evaluation set; the same ones each time, drawn by `seed`.",
        "tests/test_answers.py::test_answers_are_those_of_the_model_at_each_step",
    ),
    Honoured(
        "generate_max_new_tokens",
        "A longer answer is cut off.",
        "tests/test_answers.py::test_answers_are_those_of_the_model_at_each_step",
    ),
    Refused(
        "past_index", "it carried the hidden state of Transformer-XL from batch to batch", "Leave it out."
    ),
    Refused(
        "use_legacy_prediction_loop",
        "there is one evaluation loop, and it is exact for any number of ranks",
        "Leave it out.",
    ),
    Refused(
        "label_names",
        "the labels are the tokens of the pair, and no column has another name",
        "Leave it out.",
    ),
)

_BEST: tuple[Claim, ...] = (
    Honoured(
        "load_best_model_at_end",
        "Loads the best checkpoint into the engine, bit for bit; it is never pruned. Not with `save_only_model`.",
        "tests/test_best.py::test_the_best_model_is_loaded_at_the_end",
    ),
    Honoured(
        "metric_for_best_model",
        "Also what `reduce_lr_on_plateau` and `greedy` follow.",
        "tests/test_best.py::test_save_strategy_best",
    ),
    Honoured(
        "greater_is_better",
        "Unset: not for a metric whose name ends in `loss`.",
        "tests/test_best.py::test_save_strategy_best",
    ),
)

GROUPS = (
    Group("When to evaluate", _WHEN),
    Group("What an evaluation computes", _WHAT),
    Group("The best checkpoint", _BEST),
)
