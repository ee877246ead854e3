"""A run on disk: its folder, what it is about, its history and its outcome. Everyone who reads a run reads it here."""
