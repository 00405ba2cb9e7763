"""Programs that look at runs and recipes: compare, plan, chain, curves, overoptimise."""
