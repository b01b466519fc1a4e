"""MiniMax-M3's text model and its engine; knows nothing of the transfer service."""
