"""The server off which tests fork processes: one a test process, which has loaded what any of them needs."""

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])  # the last list counts, and takes the place of all before it
