"""Reinforcement learning: the assistant learns from the scores of its own answers."""
