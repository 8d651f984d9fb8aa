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
    from .study import baselines, controls, diagnose, leakage, metrics, plots, rate, tune, worst

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
    "controls",
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
    "worst",
]

__version__ = "0.1.0"

# What a plain run does not need is loaded when it is first asked for.
_STUDY = "baselines controls diagnose leakage metrics plots rate tune worst".split()
_LATER = {name: name for name in ("attributions", "bottleneck", "data", "importance", "store", "targets")}
_LATER |= {name: f"book.{name}" for name in ("artefacts", "frames", "glue")}
_LATER |= {name: f"study.{name}" for name in _STUDY}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = module = import_module(f"{__name__}.{_LATER[name]}")
    return module


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
