"""HEAR's downstream evaluation: tasks, probes trained on the device, metrics and tables."""
