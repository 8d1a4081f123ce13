"""The tests' own hub holds what the real one's clients expect of it: their libraries load from it unmodified."""

import json
from pathlib import Path

from tests import small_runs
from tests.hub_server import TOKEN, HubServer

CARD = """---
configs:
- config_name: math
  data_files:
  - split: train
    path: math/train.jsonl
  - split: test
    path: math/test.jsonl
---
"""
CLIENT = """
import sys
from datasets import load_dataset
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, token = sys.argv[1:]
print(AutoModelForCausalLM.from_pretrained("user/model").config.model_type)
print(AutoModelForCausalLM.from_pretrained("user/model", revision="other").config.model_type)
print(len(AutoTokenizer.from_pretrained("user/model")))
print(load_dataset("user/pairs", "math", split="test")[0]["prompt"][0]["content"])
print(next(iter(load_dataset("user/pairs", "math", split="train", streaming=True)))["prompt"][0]["content"])
api = HfApi(token=token)
print(api.create_repo("copy", private=True, exist_ok=True).repo_id)
api.upload_folder(repo_id="user/copy", folder_path=folder, commit_message="a copy")
print(AutoModelForCausalLM.from_pretrained("user/copy", token=token).config.model_type)
for case in (lambda: HfApi().model_info("user/copy"), lambda: api.model_info("user/none")):
    try:
        case()
    except Exception as error:
        print(type(error).__name__)
"""


def test_clients_load_and_upload(tmp_path: Path) -> None:
    folder = small_runs.save_model_folder(tmp_path / "model")
    lines = [json.dumps(row).encode() for row in small_runs.rows(3)]
    with HubServer() as hub:
        hub.add_model("user/model", folder)
        hub.add_model(
            "user/model", small_runs.save_model_folder(tmp_path / "llama", "llama"), revision="other"
        )
        files = {
            "README.md": CARD.encode(),
            "math/train.jsonl": lines[0],
            "math/test.jsonl": b"\n".join(lines[1:]),
        }
        hub.add_dataset("user/pairs", files)
        answer = hub.run(CLIENT, folder, TOKEN, cache=tmp_path / "cache")
        assert answer.returncode == 0, answer.stderr
        questions = [row["prompt"][0]["content"] for row in small_runs.rows(2)]
        assert answer.stdout.split("\n") == [
            *("qwen2", "llama", "260", questions[1], questions[0]),
            *("user/copy", "qwen2", "RepositoryNotFoundError", "RepositoryNotFoundError", ""),
        ]
        assert hub.messages("user/copy") == ["a copy"]
        names = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        assert hub.files("user/copy") == names
