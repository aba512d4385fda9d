"""What a step computes: one file per training stage, all behind the seam in base.py.

Importing this package imports every stage in it, so that each one's section is known to the recipe by its
`kind`.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
