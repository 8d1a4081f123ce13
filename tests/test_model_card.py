"""The model card: what it says is what the run did, and a person's README.md stays."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from orpo_ds.checkpoint import claim_output_dir, one_rank
from orpo_ds.model_card import CardFacts, card_text, is_own_card, license_of, write_card
from tests import small_runs

HISTORY = [
    {"step": 1, "loss": 3.0, "nll_loss": 2.5},
    {"step": 2, "eval_loss": 2.75, "eval_rewards/accuracies": 0.5, "eval_runtime": 1.0},
    {"step": 2, "loss": 2.0, "nll_loss": 1.5, "rewards/accuracies": 0.75},
]


def facts(**changes: object) -> CardFacts:
    fields: dict[str, object] = {
        "model_name": "Qwen2-0.5B-ORPO",
        "base_model": "Qwen/Qwen2-0.5B-Instruct",
        "hub_id": "user/Qwen2-0.5B-ORPO",
        "dataset_name": "trl-lib/ultrafeedback_binarized",
        "tags": ("mine",),
        "license": "apache-2.0",
        "is_adapter": False,
        "data": {"dataset_fingerprint": "0123456789abcdef", "train_pairs": 61_135},
        "settings": {"beta": 0.1, "learning_rate": 8e-6, "seed": 42, "hub_token": "unseen"},
        "versions": {"transformers": "5.23.0"},
        "history": HISTORY,
    }
    return CardFacts(**fields | changes)  # type: ignore[arg-type]


def table_rows(text: str) -> dict[str, list[str]]:
    """First cell of each table row -> the others."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: [cell.strip() for cell in row[1:]] for row in rows}


def test_metadata_is_what_the_hub_reads() -> None:
    data = ModelCard(card_text(facts())).data
    assert data.base_model == "Qwen/Qwen2-0.5B-Instruct"
    assert data.datasets == ["trl-lib/ultrafeedback_binarized"]
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert {"orpo", "mine", "generated_from_trainer"} <= set(data.tags)
    adapter = ModelCard(card_text(facts(is_adapter=True, base_model=None, dataset_name="my own rows"))).data
    assert adapter.library_name == "peft"
    assert adapter.base_model is None
    assert adapter.datasets is None, "the hub knows no dataset of such a name"


def test_the_figures_of_the_run() -> None:
    text = card_text(facts())
    rows = table_rows(text)
    assert rows["loss"] == ["2", "2.75"]
    assert rows["rewards/accuracies"] == ["0.75", "0.5"]
    assert rows["learning_rate"] == ["8e-06"]
    assert rows["dataset_fingerprint"] == ["0123456789abcdef"]
    assert rows["transformers"] == ["5.23.0"]
    assert "2403.07691" in text
    assert "unseen" not in text


def test_no_token_gets_into_a_card() -> None:
    secret = "hf_ThisWouldBeARealTokenOfSomebody"
    assert secret not in card_text(facts(dataset_name=secret, data={"note": f"use {secret}"}, tags=(secret,)))


def test_a_persons_readme_stays(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert write_card(tmp_path, card_text(facts()))
    assert is_own_card(path)
    assert write_card(tmp_path, card_text(facts(model_name="again"))), "our own may be replaced"
    edited = path.read_text().replace("## Results", "It is good at sums.\n\n## Results")
    path.write_text(edited)
    assert not write_card(tmp_path, card_text(facts()))
    assert path.read_text() == edited


def test_a_readme_in_the_output_folder_is_not_a_run(tmp_path: Path) -> None:
    def claim() -> None:
        claim_output_dir(tmp_path, resume_from=None, overwrite_output_dir=False, ranks=one_rank())

    (tmp_path / "README.md").write_text("Mine.")
    claim()
    (tmp_path / "README.md").unlink()
    write_card(tmp_path, card_text(facts()))
    with pytest.raises(ValueError, match=r"results of another run \(README\.md\)"):
        claim()


def test_license_of_a_local_base_model(tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama3.1\n---\n# A model\n")
    assert license_of(str(tmp_path)) == "llama3.1"
    (tmp_path / "README.md").write_text("no metadata at all")
    assert license_of(str(tmp_path)) is None


def test_a_trained_model_has_its_card(tmp_path: Path) -> None:
    run = small_runs.trainer(tmp_path / "run", eval_dataset=small_runs.dataset(3))
    run.train()
    evaluated = run.evaluate()
    run.create_model_card(dataset_name="user/pairs", tags="sums")
    run.save_model(str(tmp_path / "elsewhere"))
    for folder in (tmp_path / "run", tmp_path / "elsewhere"):
        text = (folder / "README.md").read_text()
        rows, data = table_rows(text), ModelCard(text).data
        assert "sums" in data.tags
        assert data.datasets == ["user/pairs"]
        assert float(rows["loss"][0]) == pytest.approx(run.state.log_history[1]["loss"], rel=1e-3)
        assert float(rows["loss"][1]) == pytest.approx(evaluated["eval_loss"], rel=1e-3)
        assert rows["dataset_fingerprint"] == [run.train_dataset.fingerprint]
