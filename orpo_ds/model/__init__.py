"""The model side: a transformers model taken apart, fed packed rows, and shown to give the same numbers.

`attention` is the one attention function of packed rows, `kernels` what it runs on. `anatomy` finds the
backbone and the head, so that the loss can compute log-probs without the model's own [T, V] logits.
`selfcheck` compares both with the model's own forward before the first step.
"""
