"""From the rows of a preference dataset to the tensors of a micro-batch.

The street runs one way: `load` finds the rows, `preference` makes text of them, `tokenize` makes token pairs
(cut by `truncate`, kept on disk by `token_dataset`), `batches` decides which pairs meet at a step, `packing`
lays them out. Nothing here knows a model, a loss or DeepSpeed.
"""
