"""What scores an answer."""
