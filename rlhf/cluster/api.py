"""A cluster's API in plain dictionaries, on the official client: one request function that retries what passes.

The client's typed and dynamic halves are left aside: the first would turn every document into objects and back,
the second keeps what it learnt of the cluster in a file under /tmp.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf.cluster.documents import Document
from rlhf.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

FIELD_MANAGER = "rlhf-deploy"
CONNECT_SECONDS, READ_SECONDS = 5.0, 30.0
FIRST_PATIENCE_SECONDS = 6.0
PATIENCE_SECONDS = 180.0
SETTLING_SECONDS = 20.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 8.0
Query = list[tuple[str, str]]


@dataclass(frozen=True)
class Kind:
    """A sort of object, as documents name it."""

    api_version: str
    name: str


JOB = Kind("batch/v1", "Job")
POD = Kind("v1", "Pod")
EVENT = Kind("v1", "Event")
CLAIM = Kind("v1", "PersistentVolumeClaim")
CONFIG = Kind("v1", "ConfigMap")
SERVICE = Kind("v1", "Service")
DEPLOYMENT = Kind("apps/v1", "Deployment")


class ApiRefusal(UnavailableError):
    """The API answered, and said no; `status` is its HTTP code, `details` what it said about it."""

    def __init__(self, message: str, status: int, details: Document) -> None:
        super().__init__(message)
        self.status, self.details = status, details


@dataclass
class Cluster:
    """One namespace of a cluster; context is the kubeconfig's that was asked for, if one was.

    tell gets a line for what the API server warns of, and when it is away. Requests are repeated for
    `patience_seconds` then; before it has answered once, only for a moment, as the address is probably wrong.
    """

    client: ApiClient
    namespace: str
    tell: Callable[[str], None]
    context: str | None = None
    patience_seconds: float = PATIENCE_SECONDS
    _paths: dict[Kind, tuple[str, bool]] = field(default_factory=dict)
    _reached: bool = False
    _away: float = -SETTLING_SECONDS

    def close(self) -> None:
        """Close its connections."""
        self.client.close()

    def get(self, kind: Kind, name: str) -> Document | None:
        """One object; None when there is none of that name."""
        try:
            return self._json("GET", self._path(kind, name))
        except ApiRefusal as refusal:
            if refusal.status == 404:
                return None
            raise

    def list(self, kind: Kind, *, labels: str = "") -> list[Document]:
        """The objects that carry the labels, written as `key=value,key=value`."""
        listed = self._json("GET", self._path(kind), [("labelSelector", labels)] if labels else [])
        return [{"apiVersion": kind.api_version, "kind": kind.name, **item} for item in listed["items"]]

    def knows(self, kind: Kind) -> bool:
        """Whether the cluster has this sort of object."""
        try:
            self._path(kind)
        except ConfigError:
            return False
        return True

    def is_namespaced(self, document: Document) -> bool:
        """Whether objects of this kind live in namespaces. Raises ConfigError for a kind that is not installed."""
        kind = Kind(document["apiVersion"], document["kind"])
        self._path(kind)
        return self._paths[kind][1]

    def apply(
        self, document: Document, *, dry_run: bool = False, force: bool = False, manager: str = FIELD_MANAGER
    ) -> Document:
        """Apply an object on the server: create it, or change the fields that we state.

        Fields that `manager` stated before and now leaves out are removed.
        Raises ApiRefusal with status 409 where another manager owns a field, unless `force`.
        """
        path = self._path(Kind(document["apiVersion"], document["kind"]), document["metadata"]["name"])
        query = [("fieldManager", manager), ("force", json.dumps(force))]
        query += [("dryRun", "All")] if dry_run else []
        return self._json("PATCH", path, query, body=document)

    def delete(self, document: Document, *, uid: str = "", propagation: str = "Background") -> None:
        """Delete an object and what it owns; with `uid` only that very object. One that is gone is no error."""
        body: Document = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid:
            body["preconditions"] = {"uid": uid}
        path = self._path(Kind(document["apiVersion"], document["kind"]), document["metadata"]["name"])
        try:
            self._json("DELETE", path, body=body)
        except ApiRefusal as refusal:
            if refusal.status not in (404, 409):  # 409: it is another object by now
                raise

    def log(self, pod: str, query: Query, *, read_seconds: float) -> Iterator[bytes]:
        """The log of a container in pieces as they come. Does not retry: raises ApiRefusal or UnavailableError."""
        with self._sent("GET", self._path(POD, pod) + "/log", query, None, read_seconds) as response:
            yield from response.stream(amt=None, decode_content=False)

    def _path(self, kind: Kind, name: str = "") -> str:
        """The address of an object or of all; asks the cluster once what a kind's objects are called there."""
        group = f"/api/{kind.api_version}" if "/" not in kind.api_version else f"/apis/{kind.api_version}"
        if kind not in self._paths:
            self._paths |= self._discovered(kind, group)
        plural, namespaced = self._paths[kind]
        place = f"{group}/namespaces/{self.namespace}/{plural}" if namespaced else f"{group}/{plural}"
        return f"{place}/{name}" if name else place

    def _discovered(self, kind: Kind, group: str) -> dict[Kind, tuple[str, bool]]:
        try:
            resources = self._json("GET", group)["resources"]
        except ApiRefusal as refusal:
            if refusal.status != 404:
                raise
            resources = []
        found = {
            Kind(kind.api_version, entry["kind"]): (entry["name"], entry["namespaced"])
            for entry in resources
            if "/" not in entry["name"]
        }
        if kind not in found:
            raise ConfigError(
                f"the cluster has no {kind.name} of {kind.api_version}: install what brings it, "
                "or leave it out of the overlay"
            )
        return found

    def _json(self, method: str, path: str, query: Query | None = None, body: Document | None = None) -> Document:
        """Send a request until it is answered; the answer parsed."""
        started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
        while True:
            try:
                with self._sent(method, path, query or [], body, READ_SECONDS) as response:
                    answer: Document = json.loads(response.data)
                self._reached = True
                return answer
            except UnavailableError as error:
                patience = self.patience_seconds if self._reached else FIRST_PATIENCE_SECONDS
                if not self.passes(error) or time.monotonic() - started > patience:
                    raise
                if self._reached:
                    self.tell(f"{error}; trying again for up to {patience:.0f} seconds")
            time.sleep(pause * random.uniform(0.75, 1.25))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def passes(self, error: UnavailableError) -> bool:
        """Whether a failure may be gone in a moment."""
        if not isinstance(error, ApiRefusal):
            self._away = time.monotonic()
            return True
        # A server that has just come back may not know accounts and roles yet.
        settling = time.monotonic() - self._away < SETTLING_SECONDS
        return error.status == 429 or error.status >= 500 or (settling and error.status in (401, 403))

    @contextmanager
    def _sent(self, method: str, path: str, query: Query, body: Document | None, read_seconds: float) -> Iterator[Any]:
        """A response whose body is still to be read; closed afterwards."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        host = self.client.configuration.host
        kinds = {"PATCH": "application/apply-patch+yaml", "DELETE": "application/json"}
        headers = {"Accept": "application/json, */*", "Content-Type": kinds.get(method, "application/json")}
        request = self.client.param_serialize(
            method, path, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        response = None
        try:
            answer = self.client.call_api(*request, _request_timeout=(CONNECT_SECONDS, read_seconds))
            response = answer.response
            for warning in response.headers.getlist("Warning"):
                self.tell(f"the cluster warns: {_warning_text(warning)}")
            if not 200 <= response.status <= 299:
                raise _refusal(response.status, response.data, host)
            yield response
        except ApiException as error:  # only TLS ends so: the client turns other failures into nothing of its own
            if "CERTIFICATE" in str(error.reason):
                raise ApiRefusal(f"{host} is not trusted: {short_reason(error)}", 0, {}) from error
            raise UnavailableError(f"the cluster at {host} does not answer: {short_reason(error)}") from error
        except (HTTPError, OSError) as error:
            raise UnavailableError(f"the cluster at {host} does not answer: {short_reason(error)}") from error
        finally:
            if response is not None:
                response.close()
                response.release_conn()


def _refusal(status: int, body: bytes, host: str) -> ApiRefusal:
    """What the API's error says, in a line."""
    try:
        details = json.loads(body)
        message = str(details["message"])
    except (ValueError, KeyError, TypeError):
        details, message = {}, body.decode(errors="replace") or f"HTTP {status}"
    if status == 401:
        message = f"the cluster at {host} does not know you ({message}); log in again, or choose another --context"
    elif status == 403:
        message = f"the cluster does not allow it: {message}"
    elif status >= 500 or status == 429:
        message = f"the cluster at {host} cannot answer now (HTTP {status}): {message}"
    return ApiRefusal(" ".join(message.split()), status, details)


def _warning_text(header: str) -> str:
    """The text of `299 - "text"`."""
    start, end = header.find('"'), header.rfind('"')
    return header[start + 1 : end].replace('\\"', '"') if 0 <= start < end else header


def short_reason(error: Exception) -> str:
    """The innermost reason, without object addresses."""
    reason: object = getattr(error, "reason", None) or error
    text = " ".join(str(reason).split())
    return text.rpartition("): ")[2] or type(error).__name__
