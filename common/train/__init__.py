"""What the training loops stand on: placement, updates, logs, resuming. Owns no loop."""
