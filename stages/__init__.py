"""The four stages: each reads a directory, trains, and publishes a model directory."""
