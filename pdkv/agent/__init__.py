"""The transfer service: one thread that owns a channel, a transport and the sessions, driven by ``pdkv.core``."""
