"""TRL's example script for ORPO, on orpo_ds: the same flags, the same steps.

On one process:

    python examples/orpo.py \
        --model_name_or_path Qwen/Qwen2-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --num_train_epochs 1 \
        --output_dir Qwen2-0.5B-ORPO

On several GPUs, put `deepspeed` for `python`; with adapters, add `--use_peft --lora_r 16 --lora_alpha 16`. What is left
out here (object stores, several datasets, streaming, YAML files) `orpo-ds train` does with the same flags.
"""

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from orpo_ds import ORPOConfig, ORPOTrainer
from orpo_ds.config import ScriptArguments

# For models that bring none: ChatML, the template of TRL's scripts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

if __name__ == "__main__":
    script, training = HfArgumentParser([ScriptArguments, ORPOConfig]).parse_args_into_dataclasses()

    # Model and tokenizer. The settings come first: under ZeRO-3, from_pretrained then loads each rank's shard only.
    loading = {"revision": script.model_revision, "trust_remote_code": training.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, **loading)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path, **loading)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE

    dataset = load_dataset(script.dataset_name, script.dataset_config)
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=script.lora_target_modules,
    )
    trainer = ORPOTrainer(
        model,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if training.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=adapters if script.use_peft else None,
    )

    trainer.train()
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
