"""Examples in the order of training, as token ids with a loss mask. `Example -> Encoded -> Batch`."""
