"""What is made of answers: metrics, scores of tasks, comparisons, races and estimates."""
