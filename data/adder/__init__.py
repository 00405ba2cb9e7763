"""Sums of two numbers as prompt and completion: minGPT's adder."""
