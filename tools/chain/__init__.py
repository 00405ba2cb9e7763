"""A tiny model drawn as a Markov chain."""
