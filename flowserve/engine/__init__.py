"""The engine: a FlowServe master (DeepServe section 4). Tasks in, one event per step out.

| module     | what it owns                                                               |
|------------|----------------------------------------------------------------------------|
| types      | values that cross the border to the TE-shell and the KV-transfer side      |
| engine     | the thread, the mailbox, load reports                                      |
| core       | what one step does, as plain calls: prepare, slices, finish                |
| scheduler  | the policy of a step: decodes, prefill chunks, admission, preemption       |
| budget     | the learned cost model behind the chunks' size                             |
| transfers  | the ledger of KV on offer and on its way in: when blocks may be freed      |
| sequence   | one task inside the engine                                                 |
| admission  | what is refused at submit                                                  |
| sampling, processors | how a token is drawn (used by executors)                         |
"""
