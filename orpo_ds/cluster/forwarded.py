"""Which of this shell's environment variables the ranks on other hosts get.

ssh starts with a bare environment. DeepSpeed forwards PYTHON*, NCCL* and the lines of a `.deepspeed_env`, all of them
on a command line that `ps` shows and its log prints; a W&B key does not belong there. So the variables travel as a
file of shell lines that only the user can read, which every host sources and removes (`launch.py`).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping

EXTRA_VARIABLE = "ORPO_DS_FORWARD"
PREFIXES = (
    *(
        "ORPO_DS_",
        "HF_",
        "HUGGING",
        "TRANSFORMERS_",
        "TOKENIZERS_",
        "DATASETS_",
        "PYTHON",
        "PYTORCH_",
        "TORCH",
    ),
    *("WANDB_", "MLFLOW", "COMET_", "TENSORBOARD", "CLEARML_", "SWANLAB_", "TRACKIO_"),
    *("NCCL_", "GLOO_", "UCX_", "FI_", "OMPI_", "MPI", "IB_", "RDMA", "SHARP_"),
    *("CUDA_", "NVIDIA_", "TRITON_", "DS_", "DEEPSPEED_", "FLASH_", "XDG_CACHE", "CONDA_"),
    *("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "AWS_", "GOOGLE_", "AZURE_"),
)
NAMES = frozenset(
    (
        *(
            "PATH",
            "LD_LIBRARY_PATH",
            "LD_PRELOAD",
            "VIRTUAL_ENV",
            "TMPDIR",
            "LANG",
            "LC_ALL",
            "CC",
            "CXX",
            "MAX_JOBS",
        ),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
        *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    )
)
# The launcher on each host decides these.
OWN = frozenset(("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE", EXTRA_VARIABLE))
SECRET = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def forwarded(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables to give to the ranks, tokens included.

    Args:
        environment: by default this process's. `ORPO_DS_FORWARD` names further ones, separated by spaces or commas;
            a name that ends with `*` is a prefix.
    """
    environment = os.environ if environment is None else environment
    extra = re.split(r"[\s,]+", environment.get(EXTRA_VARIABLE, "").strip())
    names = NAMES | {name for name in extra if name and not name.endswith("*")}
    prefixes = PREFIXES + tuple(name[:-1] for name in extra if name.endswith("*"))
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in names or name.startswith(prefixes)) and name not in OWN and SHELL_NAME.fullmatch(name)
    }


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that may stand on a command line: no tokens, no keys, no proxy with a password in its URL."""
    return {
        name: value
        for name, value in variables.items()
        if not SECRET.search(name) and not (name.lower().endswith("_proxy") and "@" in value)
    }


def shell_lines(variables: Mapping[str, str]) -> str:
    """`export NAME=value` lines, quoted for any POSIX shell."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
