"""The innermost loops: in C for processors, compiled for GPUs, and the random function that they share."""
