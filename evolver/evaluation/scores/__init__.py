"""Turns answers into numbers: metrics, scores, comparisons, races and estimates."""
