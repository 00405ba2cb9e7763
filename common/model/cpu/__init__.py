"""What makes the model fast on CPUs; the model can be read without it."""
