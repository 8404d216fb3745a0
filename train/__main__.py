"""``python -m train``; with ``embed`` or ``export`` as the first word, what is done with a run."""

import importlib
import os
import sys

if __name__ == "__main__":  # the guard matters: processes that draw pictures import this module again
    # Threads that wait must not spin: on a machine with anything else to do, spinning costs a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    if sys.argv[1:] and sys.argv[1] in ("embed", "export"):
        sys.exit(importlib.import_module(f"train.{sys.argv[1]}").main(sys.argv[2:]))

    from .run import main

    sys.exit(main())
