"""Model directories: how a stage publishes one, and how the next one reads it."""
