"""Evaluates candidates, with or without Ray: the worker, its plan, and the pools of workers."""
