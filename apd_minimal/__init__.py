"""Attribution-based Parameter Decomposition (APD), compact and for any network.

import apd_minimal as apd
target = apd.targets.TMS(n_features=5, d_hidden=2).fit(seed=0)
result = apd.decompose(target, **target.recipe)
print(apd.metrics.ownership(result.components, target.mechanisms()))
"""

from . import attributions, data, losses, rules, selection, store, targets
from .algorithm import decompose
from .book import artefacts, frames, glue
from .components import Components
from .config import Config
from .decomposition import Decomposition
from .network import Network
from .study import diagnose, metrics, plots
from .train import NonFiniteLoss

__all__ = [
    "Components",
    "Config",
    "Decomposition",
    "Network",
    "NonFiniteLoss",
    "artefacts",
    "attributions",
    "data",
    "decompose",
    "diagnose",
    "frames",
    "glue",
    "losses",
    "metrics",
    "plots",
    "rules",
    "selection",
    "store",
    "targets",
]

__version__ = "0.1.0"
