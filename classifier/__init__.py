"""The library behind the five stages. It never imports them."""

import atexit
import gc

# As a process ends, Python looks for garbage among all that it has loaded: with torch or MLflow, for a second
atexit.register(gc.freeze)
