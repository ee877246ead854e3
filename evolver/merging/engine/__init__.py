"""A merge method on tensors: piece by piece in plain code, or whole by the loop in C or a GPU's kernels."""
