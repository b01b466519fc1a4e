"""The HTTP client of all tests and threads."""

import httpx

HTTP = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
"""Making a client costs more than most requests of a test. Connections are not kept: the processes behind them come and
go."""
