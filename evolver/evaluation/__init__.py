"""The judging half: tasks, their items, and a live model that is scored on them. Knows neither recipes nor searches."""
