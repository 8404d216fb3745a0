"""``python -m train.compare``"""

import os
import sys

if __name__ == "__main__":  # the guard matters: worker processes import this module again
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from .study import main

    sys.exit(main())
