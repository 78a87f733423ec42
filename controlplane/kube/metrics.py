"""Metrics of calls to the Kubernetes API. Their names are client-go's where it has one."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("rest_client_requests_total", "Calls to the Kubernetes API.", ["method", "code"])
SECONDS = Histogram("rest_client_request_duration_seconds", "Calls to the Kubernetes API.", ["verb"])
RETRIES = Counter("deepflow_kube_retries_total", "Calls that were repeated.", ["method"])
LISTS = Counter("deepflow_kube_lists_total", "Full lists by why they were made.", ["resource", "cause"])
WATCH_EVENTS = Counter("deepflow_kube_watch_events_total", "Watch events.", ["resource"])
OBJECTS = Gauge("deepflow_kube_objects", "Objects in a store.", ["resource"], multiprocess_mode="livemax")
EVENTS_WRITTEN = Counter("deepflow_kube_events_total", "Events by what became of them.", ["outcome"])
