"""From the rows of a preference dataset to the tensors of a micro-batch.

The street runs one way: `load` finds the rows (`remote` behind URLs, `mixture` of several datasets), `preference` makes
text of them, `tokenize` makes token pairs (cut by `truncate`, kept on disk by `token_dataset`), `batches` decides which
pairs meet at a step, `packing` lays them out. For rows without a length `row_stream` and `token_stream` stand in for
`token_dataset` and `batches`; the `feed` does not know which it reads. Nothing here knows a model, a loss or DeepSpeed.
"""
