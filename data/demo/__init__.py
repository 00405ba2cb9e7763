"""The demo world: a small seeded English, four kinds of prompt, and the hidden gold scorer."""
