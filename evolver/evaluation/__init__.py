"""Scoring: tasks, their items, and the live model that is scored on them.

Nothing here knows how a model was made or which search proposed it.
"""
