"""Searches that evolve weights: a population of models, mutation and crossover."""
