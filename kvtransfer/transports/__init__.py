"""How bytes of announced blocks get from the sender's pool into the receiver's: one module for each way.

| module | name | how |
|---|---|---|
| `shm` | `shm` | copies out of the sender's mapped pool, once |
| `stream` | `unix`, `tcp` | the sender writes its pool to a socket, the receiver reads it into its own |
| `grpc_read` | `grpc` | the `Read` call; always there |
| `collective` | `collective` | groups of torch.distributed: NCCL, HCCL, gloo; only where it is asked for |
| `onesided` | `nixl`, `mooncake` | a library reads the sender's registered pool; only where it is asked for |

`choice` says which of them two ends use, `base` what they have in common. The receiver calls them
through `kvtransfer.peers`. The sending halves, owned by the service, are `stream_server` of the sockets and
`collective_serve` of the groups.
"""
