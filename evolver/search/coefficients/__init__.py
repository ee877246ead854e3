"""Searches over the coefficients of merge methods."""
