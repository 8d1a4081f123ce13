"""Hidden states -> token log-probs -> ORPO loss. Knows tensors and process groups, no more."""

from orpo_ds.loss.memory import head_memory_bytes
from orpo_ds.loss.odds_ratio import OrpoSums, log1mexp, log_odds, orpo_loss
from orpo_ds.loss.row_logits import LogitReader
from orpo_ds.loss.token_logps import token_logps

__all__ = ["LogitReader", "OrpoSums", "head_memory_bytes", "log1mexp", "log_odds", "orpo_loss", "token_logps"]
