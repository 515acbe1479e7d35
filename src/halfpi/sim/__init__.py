"""Simulation: Meta-World tasks, recording of demonstrations, evaluation and the demo."""
