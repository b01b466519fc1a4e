"""Typed control messages and the channel that carries them."""
