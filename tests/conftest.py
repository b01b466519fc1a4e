"""Torch's own threads, before anything imports torch: several test processes share the cores."""

import os

# Threads of torch that spin while they wait make a small model 20 times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
