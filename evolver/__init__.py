"""Evolver: search for the best merge of several fine-tunes of one base model."""

__version__ = "0.1.0"
