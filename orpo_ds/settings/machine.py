"""Rows of the fields about devices, ranks, DeepSpeed and its rivals, and how data gets to the device."""

from __future__ import annotations

from orpo_ds.settings.claims import Claim, Group, Honoured, Mapped, Refused

_RANKS: tuple[Claim, ...] = (
    Honoured(
        "deepspeed",
        "A preset's name, the path of a JSON file, or the settings themselves.",
        "tests/test_config.py::test_presets_by_name_and_path",
    ),
    Honoured(
        "local_rank",
        "The launcher's LOCAL_RANK; another number is an error.",
        "tests/test_distributed.py::test_a_local_rank_that_is_not_the_launchers",
    ),
    Honoured(
        "ddp_timeout",
        "Seconds that a collective may take.",
        "tests/test_distributed.py::test_the_process_group_is_the_one_asked_for",
    ),
    Honoured(
        "ddp_backend",
        "Of the process group; unset, nccl on GPUs and gloo on CPUs.",
        "tests/test_distributed.py::test_the_process_group_is_the_one_asked_for",
    ),
    Honoured(
        "sequence_parallel_size",
        "Ranks that share each packed row, for pairs longer than one GPU holds ([long-context.md](long-context.md)). "
        "Padded rows, encoder-decoder models, NEFTune and predictions are refused with it.",
        "tests/distributed/test_invariance.py::test_loss_metrics_and_gradients",
    ),
    Honoured(
        "tensor_parallel_size",
        "Ranks that split each matrix and the vocabulary ([presets.md](presets.md)), under ZeRO 1 and 2. Models that "
        "were not shown to be exact when split, adapters and predictions are refused with it.",
        "tests/test_tensor_parallel.py::test_training_is_that_of_one_rank",
    ),
    Mapped(
        "ddp_find_unused_parameters",
        "",
        "DeepSpeed reduces zeros for a parameter without a gradient, whatever this says.",
    ),
    Refused(
        "ddp_bucket_cap_mb",
        "gradients are reduced by DeepSpeed",
        "Set zero_optimization.reduce_bucket_size (in elements) in the DeepSpeed JSON.",
    ),
    Refused(
        "ddp_broadcast_buffers",
        "DeepSpeed broadcasts the model once, at the start",
        "Leave it out.",
        accepts=(False,),
    ),
    Refused("ddp_static_graph", "gradients are reduced by DeepSpeed", "Leave it out.", accepts=(False,)),
    Refused(
        "accelerator_config",
        "batches are dealt to the ranks without accelerate",
        "Leave it out; every rank gets its share of each global batch, and no sample is repeated.",
    ),
    Refused(
        "parallelism_config",
        "DeepSpeed shards the model, and rows are split by orpo_ds",
        "Choose the ZeRO stage with `deepspeed`, and sequence_parallel_size for long pairs.",
    ),
    Refused("fsdp", "models are sharded by DeepSpeed", "Use deepspeed='zero3'.", accepts=(None, False, [])),
    Refused("fsdp_config", "models are sharded by DeepSpeed", "Use deepspeed='zero3'.", accepts=({},)),
    Refused("fsdp_min_num_params", "models are sharded by DeepSpeed", "Use deepspeed='zero3'."),
    Refused(
        "fsdp_transformer_layer_cls_to_wrap", "models are sharded by DeepSpeed", "Use deepspeed='zero3'."
    ),
    Refused("mp_parameters", "it belongs to SageMaker's model parallelism", "Use deepspeed='zero3'."),
    Refused("ray_scope", "there is no hyperparameter search through Ray here", "Leave it out."),
)

_DEVICES: tuple[Claim, ...] = (
    Honoured(
        "use_cpu",
        "On a machine with GPUs an error that names the environment variables to start with: DeepSpeed chooses the "
        "device when it is imported.",
        "tests/test_config.py::test_use_cpu",
    ),
    Mapped("no_cuda", "use_cpu", "The same."),
    Refused("use_mps_device", "DeepSpeed does not train on Apple's GPUs", "Leave it out; the CPU is used."),
    Refused("use_ipex", "Intel has ended that extension; torch has its kernels", "Leave it out."),
    Refused("tpu_num_cores", "DeepSpeed does not run on TPUs", "Train on GPUs or CPUs."),
    Refused("tpu_metrics_debug", "DeepSpeed does not run on TPUs", "Leave it out."),
    Honoured(
        "debug",
        "`underflow_overflow` stops at the first layer whose weights or activations are not finite, and prints the "
        "layers before.",
        "tests/test_engine.py::test_the_first_layer_that_overflows_is_named",
        refuses={"tpu_metrics_debug": "DeepSpeed does not run on TPUs. Leave it out."},
    ),
)

_LOADING: tuple[Claim, ...] = (
    Honoured(
        "dataloader_drop_last",
        "Leaves out the last batch of an epoch if it is not full.",
        "tests/data/test_batches.py::test_drop_last_leaves_out_what_does_not_fill_a_batch",
    ),
    Mapped(
        "dataloader_num_workers",
        "",
        "Rows are tokenised beforehand, so one background thread builds the micro-batches; it keeps as many ready as "
        "the workers would.",
    ),
    Honoured(
        "dataloader_prefetch_factor",
        "Micro-batches that are built ahead, for each of `dataloader_num_workers`.",
        "tests/data/test_prefetch.py::test_a_run_builds_as_far_ahead_as_its_workers_would",
    ),
    Honoured(
        "dataloader_pin_memory",
        "Copies to a GPU go through pinned memory.",
        "tests/data/test_prefetch.py::test_micro_batches_on_a_gpu_are_those_on_the_host",
    ),
    Mapped("dataloader_persistent_workers", "", "There are no worker processes: one background thread."),
    Refused("dataloader_multiprocessing_context", "there are no worker processes", "Leave it out."),
    Refused(
        "dataloader_in_order",
        "the batch of a step is always the same, so that a run can be resumed exactly",
        "Leave it at True.",
    ),
    Mapped(
        "remove_unused_columns",
        "",
        "Columns that a pair does not need stay in the dataset and never reach the model, whatever this says.",
    ),
)

_SCRIPT: tuple[Claim, ...] = (
    Honoured(
        "do_train",
        "`orpo-ds train` trains in any case, as TRL's scripts do.",
        "tests/test_cli.py::test_trls_example_command",
    ),
    Honoured(
        "do_eval",
        "Reads the test split and evaluates as `eval_strategy` says, which turns this on; with `no`, at the end.",
        "tests/test_cli.py::test_an_evaluation_and_a_prediction_at_the_end",
    ),
    Honoured(
        "do_predict",
        "Logs the metrics of `predict` on the test split, as `test_…`, at the end.",
        "tests/test_cli.py::test_an_evaluation_and_a_prediction_at_the_end",
    ),
)

GROUPS = (
    Group("Ranks, DeepSpeed and what it replaces", _RANKS),
    Group("Devices", _DEVICES),
    Group("Loading data", _LOADING),
    Group("What `orpo-ds train` does", _SCRIPT),
)
