"""How far a compressed cache moves a model's output: metrics, recall, baselines to compare with, and plots."""
