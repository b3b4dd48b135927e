"""Training room: session, loop, validate, losses, checkpoint, run, inference; evaluation, calibration, adaptation."""

import os

# Read when torch loads its thread pool, hence here, before any module of the room imports torch. Idle OpenMP threads
# spin for long by default and take the cores from decoding workers and from whatever else runs: beside one busy process
# on two cores, training the tiny preset fell from 314 to 14 images/s. A short spin keeps the 314 when the machine is
# quiet and 100 when it is not; none at all (OMP_WAIT_POLICY=PASSIVE) gives 190 quiet and 160 busy.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
