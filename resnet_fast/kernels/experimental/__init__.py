"""Where new kernels start; importing this package imports every file beside it. Copy ``template.py`` of the kit to begin one."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
