"""Attribution-based Parameter Decomposition (APD), compact and for any network.

import apd_minimal as apd
target = apd.targets.TMS(n_features=5, d_hidden=2).fit(seed=0)
result = apd.decompose(target, **target.recipe)
print(apd.metrics.ownership(result.components, target.mechanisms()))
"""

from . import artefacts, attributions, data, diagnose, frames, glue, losses, metrics, plots, rules, store, targets, topk
from .algorithm import decompose
from .components import Components
from .config import Config
from .decomposition import Decomposition
from .gates import Network
from .run import NonFiniteLoss

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
    "store",
    "targets",
    "topk",
]

__version__ = "0.1.0"
