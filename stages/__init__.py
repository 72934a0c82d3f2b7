"""The five stages of dvc.yaml, one script each. They meet only through files.

This file is read before a stage's own imports, so what must be set before torch is loaded is set here. It may
decide the speed, never a result: no stage depends on it.
"""

import os

# How long torch's threads wait actively for one another (GNU OpenMP; about 0.1 ms). By default they do so for
# milliseconds, and two trainings at once on the same cores, as with `dvc queue start -j 2`, each took 40 times as long
# as one alone (n = 3); with this, three times as long, and one alone is as fast as by default.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
