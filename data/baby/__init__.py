"""A sequence of symbols for the smallest GPT: Karpathy's baby GPT."""
