"""Reward modelling: comparisons of answers are collected, and a model learns them."""
