"""Text and prompts for the recipes: what makes them, one folder a source."""
