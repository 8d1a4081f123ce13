"""Tokens are recognised by name and by value; what only sounds like one stays."""

from __future__ import annotations

import pytest

from orpo_ds.redact import redact


def test_secrets_by_name() -> None:
    config = {"hub_token": "s3cret", "nested": [{"wandb_api_key": "s3cret"}], "push_to_hub_token": "s3cret"}
    assert "s3cret" not in repr(redact(config))
    assert config["hub_token"] == "s3cret", "the config itself is not changed"


def test_secrets_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", "")
    text = {"url": "https://user:0123456789abcdef@host", "note": "use hf_AbCdEfGhIjKlMnOpQrStUvWx please"}
    assert redact(text) == {"url": "https://user:<redacted>@host", "note": "use <redacted> please"}


def test_what_is_no_secret() -> None:
    config = {
        "eos_token": "</s>",
        "max_tokens_per_micro_batch": 4096,
        "hub_token": None,
        "average_tokens_across_devices": True,
        "model_name_or_path": "hf_model",
        "git_commit": "c3a5e43f7d0f6c1d8a9b2e4f60718293a4b5c6d7",
    }
    assert redact(config) == config
