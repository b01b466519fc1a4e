"""Composition roots: the only readers of configuration and environment."""
