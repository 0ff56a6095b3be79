"""A stage on one process or many, on one node or several: `rlhf launch`."""
