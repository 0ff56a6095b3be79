"""Driving the stages on a cluster: `rlhf deploy`, `undeploy`, `cluster-status` and `cluster-logs`."""
