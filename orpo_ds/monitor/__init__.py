"""Watching a run: metric sums, `metrics.jsonl`, W&B, and what the device can do."""
