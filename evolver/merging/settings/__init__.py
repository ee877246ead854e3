"""Which settings are in force for which tensor, and what a search may vary of them."""
