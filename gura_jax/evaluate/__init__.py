"""Downstream evaluation: tasks of benchmarks, probes trained on the device, metrics and tables."""
