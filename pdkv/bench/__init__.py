"""Measures what a move costs, beside other movers, in one interleaved run that checks every byte."""
