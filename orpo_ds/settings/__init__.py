"""What happens to each setting: one row a field, the fields that transformers has dropped, and the page of both.

`table.py` holds every field of `ORPOConfig` (TRL's, transformers' and ours), in groups; the rows stand in
`training.py`, `evaluation.py`, `output.py` and `machine.py`. A field is honoured, mapped to its successor, or refused
by name: nothing is passed over in silence. `docs/config.md` is written from the table by `python -m orpo_ds.settings`.
"""
