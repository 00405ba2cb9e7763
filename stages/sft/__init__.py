"""Supervised finetuning: demonstrations make an assistant of a base model."""
