"""Pages and what is in them: arena rows and views, the page pool, the probe's pattern."""
