"""The version, without the package that shows it: what checks it must not import all of that."""

__all__ = ["__version__"]

__version__ = "0.2.0"
