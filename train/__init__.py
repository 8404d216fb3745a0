"""Train an image embedding against a cross-batch memory and say how good it became: ``python -m train --help``."""
