"""Strict configs: what a key may be, and where a wrong one stands."""
