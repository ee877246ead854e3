"""The making half: checkpoints, operators, merge methods, and recipes turned into weights. Knows no search."""
