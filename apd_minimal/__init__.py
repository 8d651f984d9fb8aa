"""Attribution-based Parameter Decomposition (APD), compact and for any network.

import apd_minimal as apd
target = apd.targets.TMS(n_features=5, d_hidden=2).fit(seed=0)
result = apd.decompose(target, **target.recipe)
print(apd.metrics.ownership(result.components, target.mechanisms()))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import losses, rules, selection
from .algorithm import decompose
from .checks import NonFiniteLoss
from .components import Components
from .config import Config
from .decomposition import Decomposition
from .network import Network

if TYPE_CHECKING:
    from . import attributions, bottleneck, data, importance, store, targets
    from .book import artefacts, frames, glue
    from .study import baselines, diagnose, leakage, metrics, plots, rate, tune

__all__ = [
    "Components",
    "Config",
    "Decomposition",
    "Network",
    "NonFiniteLoss",
    "artefacts",
    "attributions",
    "baselines",
    "bottleneck",
    "data",
    "decompose",
    "diagnose",
    "frames",
    "glue",
    "importance",
    "leakage",
    "losses",
    "metrics",
    "plots",
    "rate",
    "rules",
    "selection",
    "store",
    "targets",
    "tune",
]

__version__ = "0.1.0"

# What a plain run does not need is loaded when it is first asked for.
_LATER = {
    "artefacts": "book.artefacts",
    "attributions": "attributions",
    "baselines": "study.baselines",
    "bottleneck": "bottleneck",
    "data": "data",
    "diagnose": "study.diagnose",
    "frames": "book.frames",
    "glue": "book.glue",
    "importance": "importance",
    "leakage": "study.leakage",
    "metrics": "study.metrics",
    "plots": "study.plots",
    "rate": "study.rate",
    "store": "store",
    "targets": "targets",
    "tune": "study.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = module = import_module(f"{__name__}.{_LATER[name]}")
    return module


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
