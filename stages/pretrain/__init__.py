"""Pretraining: text becomes shards, shards become a base model."""
