"""Searches that descend: they learn the coefficients of task arithmetic by gradients, and look at no right answer."""
