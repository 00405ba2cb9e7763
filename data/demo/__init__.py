"""The embedded demo world: a small seeded English, its four kinds of prompt, and the hidden gold
scorer."""
