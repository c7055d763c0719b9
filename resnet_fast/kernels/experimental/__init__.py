"""New kernels start here. Importing this package imports every file in it; ``new-kernel`` writes the first one."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
