"""Programs that run from a checkout: ``python -m tools.NAME``. None of them is installed with the package."""
