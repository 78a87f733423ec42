"""The Kubernetes API as our processes use it: raw JSON in and out, over the official client's asyncio half.

Called by the operator, by gateways in a cluster and by the command line.

| module    | what it holds                                                                        |
|-----------|--------------------------------------------------------------------------------------|
| resources | which API path a kind has                                                            |
| client    | `KubeApi`: get, list, create, apply, patch, delete, watch; typed errors; bounded calls |
| reflector | `Reflector` and `Store`: a list that is kept current by a watch                      |
| lease     | `LeaderElection` over a coordination.k8s.io Lease                                    |
| events    | `EventRecorder`: deduplicated Events                                                 |

The client's own informer is synchronous, and its typed models cost more than they give here: objects are
dictionaries as the server sent them, checked where they become values of ours.
"""
