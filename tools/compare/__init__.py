"""The same prompts to several models, side by side: in the terminal, as JSON, as a page."""
