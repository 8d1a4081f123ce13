"""What the package is called, holds and needs.

Ranges stand here, exact releases in `constraints.txt`; `make` installs the two together. The presets of
`ds_configs/` and the launch scripts of `launch/` lie beside the package in a checkout and inside it in a wheel;
`orpo_ds.shipped` finds them in both.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "orpo_ds/__init__.py").read_text(), re.MULTILINE).group(
    1
)
README = HERE / "README.md"

DEMO = ["gguf>=0.17"]
PLOT = ["matplotlib>=3.10"]  # orpo-ds plot
# Processors of Qwen-VL and SmolVLM read videos too, and cannot be made without what that takes.
VISION = ["num2words>=0.5", "pillow>=10", "torchvision>=0.25"]
QLORA = ["bitsandbytes>=0.50"]
LOW_RANK = ["apollo-torch>=1.0.3", "galore-torch>=1.0"]
TEST = [
    *DEMO,
    *LOW_RANK,
    *PLOT,
    *QLORA,
    "dashscope>=2.0",  # trl.experimental imports it
    "fastapi>=0.110",  # transformers serve, for tests/test_transformers_chat.py
    "hypothesis>=6.100",
    "mistral-common>=1.13",  # Mistral's tokenizers in transformers
    "mypy>=2.0",
    "openai>=1.98",  # transformers serve
    "pillow>=10",
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "sentencepiece>=0.2",
    "setuptools>=77",  # builds flash-attn's CPU reference, with wheel
    "tensorboard>=2.20",  # the dashboard of tests/monitor/test_report.py
    "tiktoken>=0.12",
    "trl==1.16.0",  # the other side of tests/parity and benchmarks/vs_trl.py
    "types-PyYAML",
    "types-tqdm",
    "uvicorn>=0.30",  # transformers serve
    "wheel>=0.45",
]

setup(
    name="orpo-ds",
    version=VERSION,
    description="ORPO preference training for large language models on DeepSpeed",
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["orpo_ds", "orpo_ds.*"]), "orpo_ds.ds_configs", "orpo_ds.launch"],
    package_dir={"orpo_ds.ds_configs": "ds_configs", "orpo_ds.launch": "launch"},
    package_data={"orpo_ds.ds_configs": ["*.json"], "orpo_ds.launch": ["*/*"]},
    entry_points={"console_scripts": ["orpo-ds = orpo_ds.cli:main"]},
    install_requires=[
        "accelerate>=1.10",  # transformers.TrainingArguments imports it
        "datasets>=5.0",
        "deepspeed>=0.19.8",
        "ninja>=1.11",  # DeepSpeed compiles its CPU optimizer with it at the first use of offload
        "peft>=0.21",
        "psutil>=6.0",
        "PyYAML>=6.0",
        "rich>=14.0",
        "safetensors>=0.6",
        "torch>=2.10",
        "transformers>=5.23",
        "wandb>=0.31",
    ],
    extras_require={
        "demo": DEMO,
        "gpu": ["flash-attn>=2.8.3"],
        "low-rank": LOW_RANK,
        "plot": PLOT,
        "qlora": QLORA,
        "test": TEST,
        "vision": VISION,
    },
)
