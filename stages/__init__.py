"""The five stages of dvc.yaml, one script each. They meet only through files.

This file is read before a stage's own imports, so what must be set before torch is loaded is set here. It may
decide the speed, never a result: no stage depends on it.
"""

import os

# How long torch's threads wait actively for one another (GNU OpenMP; about 0.1 ms). By default they do so for
# milliseconds: two trainings at once on the same cores, as with `dvc queue start -j 2`, then hold each other up so much
# that both take many times as long as one after the other. One alone is as fast with this as by default.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
