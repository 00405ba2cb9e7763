"""The GPT: its shape, its layers, sampling, LoRA, and what it costs."""
