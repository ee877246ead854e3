"""Searches over programs of layers: which model each layer is taken from, and which layers a model has at all."""
