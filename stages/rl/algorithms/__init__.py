"""One small file for each reinforcement-learning algorithm."""
