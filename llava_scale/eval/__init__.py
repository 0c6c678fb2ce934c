"""How good a model is: tasks, metrics, runs."""
