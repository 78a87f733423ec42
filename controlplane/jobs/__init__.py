"""Requests as jobs and tasks: their records, their state machine, their store, the serving job executor.

The gateway is the caller (border: `serving.py`, wiring: `runtime.py`). DeepServe's request-job-task
abstraction, with replay so that an executor's death is a pause and not an error.

| module   | what it holds                                                                       |
|----------|-------------------------------------------------------------------------------------|
| serving  | the border to the gateway: request in, choice deltas out                             |
| runtime  | `ServingRuntime`: everything below opened and closed together                        |
| executor | admission, the pump over what waits, deadlines                                      |
| waiting  | what waits: a fair queue per model, and finished prefills                            |
| job      | one request's choices and their delivery                                             |
| choice   | one choice: placed, streamed, handed over, replayed                                  |
| progress | which tokens are new, whatever attempts repeat (pure)                                |
| states   | the state machines as data (pure)                                                    |
| wire     | requests to protobuf, errors and log-probabilities from it                           |
| records  | what is remembered of a job                                                          |
| store    | records in Redis; `writer` puts them there behind serving's back                     |
"""
