"""Which cluster: the kubeconfig's, or the one around this pod."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rlhf.cluster.api import Cluster, short_reason
from rlhf.errors import UnavailableError


def connect(context: str | None, namespace: str, tell: Callable[[str], None]) -> Cluster:
    """The cluster that --context, KUBECONFIG, ~/.kube/config or the pod's own account name, in this order.

    Raises UnavailableError where none is named; sends nothing yet.
    """
    from kubernetes import config
    from kubernetes.client import ApiClient, Configuration
    from yaml import YAMLError

    settings = Configuration()
    named = os.environ.get("KUBECONFIG") or "~/.kube/config"
    inside = "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ
    try:
        if inside and context is None and not Path(named).expanduser().exists():
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(
                config_file=named, context=context, client_configuration=settings, persist_config=False
            )
    except (config.ConfigException, OSError, YAMLError) as error:
        raise UnavailableError(
            f"no cluster is named: {short_reason(error)}; set KUBECONFIG or --context so that `kubectl get pods` works"
        ) from error
    settings.retries = False  # ours tell the two kinds of failure apart, and last as long as a server takes to restart
    settings.connection_pool_maxsize = 64  # every followed pod holds one
    return Cluster(ApiClient(settings), namespace, tell, context)
