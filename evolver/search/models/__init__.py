"""Searches that recombine whole models: the experts, and models that were made of them."""
