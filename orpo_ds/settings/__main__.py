"""`python -m orpo_ds.settings > docs/config.md`."""

from orpo_ds.settings.page import page

print(page(), end="")
