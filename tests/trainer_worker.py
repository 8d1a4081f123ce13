"""What only several ranks can show of the trainer, in one start of two ranks under ZeRO-3.

    deepspeed --num_accelerators 2 --module tests.trainer_worker FOLDER

FOLDER holds `model`. Each part trains into FOLDER/<part>; what was seen goes to FOLDER/results.pt, by part.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ds import ORPOConfig, ORPOTrainer, distributed
from orpo_ds.export import full_state
from orpo_ds.monitor.report import reporting_callbacks
from orpo_ds.step import NonFiniteLossError
from tests import small_runs

TRAINED_STEPS = 3
EVAL_PAIRS = 11
TOKENS_THAT_FIT = 130
BATCH_SIZES = (1, 3, 8)
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": TRAINED_STEPS,
    # Adam would blow a gradient that is nothing but rounding up to the size of a real one.
    "optim": "sgd",
    "learning_rate": 0.05,
    "deepspeed": "zero3",
}


def quick_start(folder: Path) -> dict[str, Any]:
    """TRL's quick start, line by line: the model is an object that was loaded before anything knew of ZeRO-3."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    train_dataset = small_runs.dataset(8)
    training_args: ORPOConfig = small_runs.settings(
        folder / "quick_start", **SETTINGS | {"report_to": "wandb"}
    )
    trainer = ORPOTrainer(
        model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset
    )
    trainer.train()
    place = (training_args.world_size, training_args.process_index, training_args.local_process_index)
    return {
        "parameters": full_state(trainer.model),
        "history": small_runs.step_lines(trainer),
        "places": distributed.gather_objects(place),
        "reporters": distributed.gather_objects(
            len(reporting_callbacks(training_args, output_dir=str(folder), facts=dict))
        ),
    }


def by_name(folder: Path) -> dict[str, Any]:
    """The model by its folder's name: `from_pretrained` under zero.Init."""
    trainer = ORPOTrainer(
        str(folder / "model"),
        small_runs.settings(folder / "by_name", **SETTINGS),
        train_dataset=small_runs.dataset(8),
    )
    held = [value.numel() for value in trainer.model.parameters()]
    trainer.train()
    trainer.save_model()
    return {
        "parameters": full_state(trainer.model),
        "history": small_runs.step_lines(trainer),
        "elements_before_the_engine": sum(held),
    }


def evaluations(folder: Path) -> dict[str, Any]:
    """The same set in rounds of several sizes, none of which divides it evenly over two ranks."""
    found = {}
    for batch_size in BATCH_SIZES:
        trainer = small_runs.trainer(
            folder / f"evaluation-{batch_size}",
            model=str(folder / "model"),
            train_dataset=None,
            eval_dataset=small_runs.dataset(EVAL_PAIRS),
            per_device_eval_batch_size=batch_size,
            max_tokens_per_micro_batch=130,
            deepspeed="zero3",
        )
        found[batch_size] = trainer.evaluate()
    return found


def adapters(folder: Path) -> dict[str, Any]:
    """LoRA: what is frozen stays, and its head never has a gradient."""
    trainer = small_runs.trainer(
        folder / "adapters",
        model=str(folder / "model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        **SETTINGS | {"learning_rate": 0.5},
    )
    head = trainer.policy.parts.head.weight
    gradients: list[Any] = []
    trainer.policy.head.register_full_backward_hook(lambda *_: gradients.append(head.grad))
    before = full_state(trainer.model)
    trainer.train()
    trainer.save_model()
    after = full_state(trainer.model)
    whole = trainer.model.get_base_model()
    return {
        "before": before,
        "after": after,
        "head_trains": head.requires_grad,
        "head_gradients": [gradient is not None for gradient in gradients],
        "base": full_state(whole),
        "history": small_runs.step_lines(trainer),
    }


def half_adapters(folder: Path) -> dict[str, Any]:
    """LoRA on a bf16 model, which PEFT would leave in fp32."""
    trainer = small_runs.trainer(
        folder / "half_adapters",
        model=str(folder / "model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        **SETTINGS | {"learning_rate": 0.5, "bf16": True},
    )
    before = full_state(trainer.model)
    trainer.train()
    return {
        "dtypes": distributed.gather_objects({value.dtype for value in trainer.model.parameters()}),
        "before": before,
        "after": full_state(trainer.model),
        "history": small_runs.step_lines(trainer),
    }


def streamed(folder: Path) -> dict[str, Any]:
    """Rows of unknown number, which each rank reads for itself."""
    settings = small_runs.settings(folder / "streamed", **SETTINGS)
    trainer = ORPOTrainer(str(folder / "model"), settings, train_dataset=stream())
    trainer.train()
    try:
        ORPOTrainer(str(folder / "model"), settings, train_dataset=stream().skip(distributed.rank()))
        message = ""
    except ValueError as error:
        message = str(error)
    return {"history": trainer.state.log_history, "messages": distributed.gather_objects(message)}


def stream() -> IterableDataset:
    """More rows than are trained on, in shards."""
    return small_runs.dataset(30).to_iterable_dataset(num_shards=3)


def best_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A `preprocess_logits_for_metrics`."""
    return logits.argmax(-1)


def answers(folder: Path) -> dict[str, Any]:
    """The training of `by_name` again, with answers of an odd number of prompts, and then predictions."""
    trainer = small_runs.trainer(
        folder / "answers",
        model=str(folder / "model"),
        pairs=8,
        eval_dataset=small_runs.dataset(5),
        preprocess_logits_for_metrics=best_tokens,
        per_device_eval_batch_size=1,
        generate_during_eval=True,
        generate_num_prompts=3,
        generate_max_new_tokens=6,
        eval_strategy="steps",
        eval_steps=TRAINED_STEPS,
        include_for_metrics=["loss"],
        **SETTINGS,
    )
    trainer.train()
    found = trainer.predict(small_runs.dataset(EVAL_PAIRS))
    return {
        "parameters": full_state(trainer.model),
        "predictions": distributed.gather_objects((found.predictions, found.label_ids)),
    }


def blow_up(folder: Path) -> dict[str, Any]:
    """A learning rate that makes the second step's loss NaN: what each rank says of it."""
    changes = SETTINGS | {"learning_rate": 1e30, "save_strategy": "steps", "save_steps": 1}
    trainer = small_runs.trainer(folder / "blow_up", model=str(folder / "model"), pairs=8, **changes)
    try:
        trainer.train()
        message = ""
    except NonFiniteLossError as error:
        message = str(error)
    return {"messages": distributed.gather_objects(message)}


def fitted(folder: Path) -> dict[str, Any]:
    """A model that runs out of memory above a number of tokens: what both ranks make of it, and how far they train."""
    trainer = small_runs.trainer(
        folder / "fitted",
        model=str(folder / "model"),
        pairs=8,
        auto_find_batch_size=True,
        max_tokens_per_micro_batch=TOKENS_THAT_FIT * 2,
        **SETTINGS,
    )
    widths: list[int] = []

    def check(module: Any, words: Any, output: torch.Tensor) -> None:
        widths.append(output.shape[1])
        if output.shape[1] > TOKENS_THAT_FIT:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    trainer.policy.parts.backbone.layers[1].mlp.register_forward_hook(check)
    trainer.train()
    return {
        "widest": distributed.gather_objects(max(widths)),
        "after": distributed.gather_objects(max(widths[widths.index(max(widths)) + 1 :])),
        "history": small_runs.step_lines(trainer),
    }


def split_rows(folder: Path) -> dict[str, Any]:
    """The training of `by_name` with both ranks on each row: with evaluations, a checkpoint, and on from there."""

    def trainer(**changes: Any) -> ORPOTrainer:
        settings = SETTINGS | {
            "per_device_train_batch_size": 4,
            "sequence_parallel_size": 2,
            "mlp_tile_tokens": 40,
        }
        return small_runs.trainer(
            folder / "split_rows",
            model=str(folder / "model"),
            pairs=8,
            eval_dataset=small_runs.dataset(EVAL_PAIRS),
            max_tokens_per_micro_batch=130,
            save_strategy="steps",
            save_steps=TRAINED_STEPS - 1,
            **settings | changes,
        )

    whole = trainer()
    widths: list[int] = []
    whole.model.get_input_embeddings().register_forward_hook(
        lambda _, words, out: widths.append(out.shape[1])
    )
    whole.train()
    parameters = full_state(whole.model)
    try:
        whole.predict(small_runs.dataset(2))
        message = ""
    except ValueError as error:
        message = str(error)
    found = {
        "parameters": parameters,
        "history": small_runs.step_lines(whole),
        "evaluation": whole.evaluate(),
        "widest": distributed.gather_objects(max(widths)),
        "message": message,
    }
    again = trainer(overwrite_output_dir=False)
    again.train(resume_from_checkpoint=str(folder / "split_rows" / f"checkpoint-{TRAINED_STEPS - 1}"))
    return found | {"resumed": full_state(again.model)}


def one_head(folder: Path) -> dict[str, Any]:
    """A model whose heads two ranks cannot share."""
    config = small_runs.model_of().config
    config.num_attention_heads = config.num_key_value_heads = 1
    trainer = small_runs.trainer(
        folder / "one_head",
        model=AutoModelForCausalLM.from_config(config),
        pairs=8,
        sequence_parallel_size=2,
        **SETTINGS,
    )
    try:
        trainer.train()
        message = ""
    except ValueError as error:
        message = str(error)
    return {"messages": distributed.gather_objects(message)}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "quick_start": quick_start,
    "by_name": by_name,
    "evaluations": evaluations,
    "adapters": adapters,
    "half_adapters": half_adapters,
    "streamed": streamed,
    "answers": answers,
    "blow_up": blow_up,
    "fitted": fitted,
    "split_rows": split_rows,
    "one_head": one_head,
}


def main(folder: Path) -> None:
    """See the module."""
    distributed.start_process_group(timeout_s=120)
    results = {name: part(folder) for name, part in PARTS.items()}
    results["model_steps_of_all_ranks"] = distributed.gather_objects(results["by_name"]["history"])
    if distributed.is_main():
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
