"""HEAR 2021 as a benchmark: task folders, protocols of its evaluation kit, and the paper's comparisons."""
