"""``python -m train``"""

import os
import sys

if __name__ == "__main__":  # the guard matters: processes that draw pictures import this module again
    # Threads that wait must not spin: on a machine with anything else to do, spinning costs a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from .run import main

    sys.exit(main())
