"""pdkv moves the attention state of MiniMax-M3 from prefill workers to decode workers."""

__version__ = "0.1.0"
