"""A run on many hosts: checks before the start, the start over ssh, batch jobs.

Nothing of the training is imported here: these modules run beside it, many of them on a host that trains nothing.
"""
