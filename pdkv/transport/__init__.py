"""Transports: one seam (``base.Transport``), one file per implementation, one shipped conformance kit."""
