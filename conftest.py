"""The environment in which stored outputs are made, for the kernels that nbval starts too."""

import os

from execute import ENVIRONMENT

os.environ.update(ENVIRONMENT)
