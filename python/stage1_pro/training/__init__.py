"""Training room: prepare, loop, losses, checkpoint, inference."""

import os

# Read when torch loads its thread pool, hence here, before any module of the room imports torch. Idle OpenMP threads
# that spin take the cores from decoding workers and from whatever else runs: with one busy neighbour on two cores,
# training the tiny preset fell from 160 to 14 images/s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
