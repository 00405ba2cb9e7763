"""How a program starts, ends, writes files and speaks; knows nothing of models."""
