"""Several searches under one budget."""
