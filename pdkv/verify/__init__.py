"""Checkpoints and prompts whose answers are known, and what is proved with them."""
