"""A file of instructions, split by prompt for the four stages."""
