"""firn: checkpoint and restore of Linux processes."""

__version__ = "0.1.0"
