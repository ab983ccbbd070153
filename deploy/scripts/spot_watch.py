"""Drains the server when the cloud says that it will take the machine away: ``spot_watch.py aws|gcp|azure``.

Runs beside the server as a sidecar and asks the machine's metadata service every five seconds. After a notice it posts
to the server's drain endpoint, so that readiness is false at once and running requests still finish. It goes on
posting: the server ends when it is idle, and the kubelet starts another, which has no future on this machine either.

Sources:
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import urllib.error
import urllib.request

__all__ = ["PROVIDERS", "drain", "noticed"]

_TIMEOUT_S = 2.0


def _ask(url: str, method: str = "GET", **headers: str) -> str:
    """The body of the answer; empty when there is nothing at that address (404)."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method=method, headers=names), timeout=_TIMEOUT_S
        ) as got:
            return got.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        raise


def _aws(metadata: str) -> bool:
    token = _ask(f"{metadata}/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    return bool(_ask(f"{metadata}/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=token))


def _gcp(metadata: str) -> bool:
    return _ask(f"{metadata}/computeMetadata/v1/instance/preempted", Metadata_Flavor="Google").strip() == "TRUE"


def _azure(metadata: str) -> bool:
    answer = _ask(f"{metadata}/metadata/scheduledevents?api-version=2020-07-01", Metadata="true")
    own = _ask(f"{metadata}/metadata/instance/compute/name?api-version=2021-02-01&format=text", Metadata="true")
    events = json.loads(answer or "{}").get("Events", [])
    return any(event["EventType"] in ("Preempt", "Terminate") and own in event["Resources"] for event in events)


PROVIDERS = {"aws": _aws, "gcp": _gcp, "azure": _azure}


def noticed(provider: str, metadata: str) -> bool:
    """Whether the machine's metadata holds a notice. A service that does not answer has not given one."""
    try:
        return PROVIDERS[provider](metadata)
    except (OSError, ValueError, KeyError) as error:
        print(f"The metadata service at {metadata} did not answer: {error}", file=sys.stderr, flush=True)
        return False


def drain(url: str, key: str) -> bool:
    """Whether the server accepted to drain."""
    request = urllib.request.Request(url, method="POST", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            return True
    except OSError as error:
        print(f"{url} did not accept to drain: {error}", file=sys.stderr, flush=True)
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--metadata", default="http://169.254.169.254")
    parser.add_argument("--drain-url", default="http://127.0.0.1:8000/admin/drain?delay_s=5")
    parser.add_argument("--interval-s", type=float, default=5.0)
    given = parser.parse_args()

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.is_set() and not noticed(given.provider, given.metadata):
        stop.wait(given.interval_s)
    if not stop.is_set():
        print("The machine will be taken away: draining the server.", flush=True)
    while not stop.is_set():
        drain(given.drain_url, os.environ.get("ADMIN_KEY", ""))
        stop.wait(given.interval_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
