"""The records of training runs: one store for all runs of a folder, optional services, and comparing two runs."""

from .sinks import Sink, Sinks, open_sinks

__all__ = ["Sink", "Sinks", "open_sinks"]
