"""RTC, the relational tensor cache (DeepServe section 4.3): blocks, indexes, tiers.

| module    | what it owns                                                         |
|-----------|----------------------------------------------------------------------|
| cache     | `RTC`: the paper's API; references, eviction, audit                   |
| placement | which blocks a table gets and what is evicted for it, in long runs   |
| allocator | the free blocks as contiguous segments                               |
| index     | identity -> block (the radix tree over blocks), context id -> blocks |
| staging   | copies ahead of a transfer that make fewer runs of a table           |
| tiers     | host memory and disk behind the device, as one                       |
| host      | pages of evicted blocks in host memory                               |
| disk      | pages that host memory let go, written behind; `folder`: the bounded |
|           | folder that executors share; `pagefile`: one page as a file          |
| populate  | pages on their way back to the device                                |
| costs     | what bringing a page back takes, as measured                         |
| events    | the numbered log of what became reusable and what did not stay so    |

Used by `flowserve.engine` on its thread; knows nothing of sequences or devices.
"""

from flowserve.rtc.cache import RTC, AuditReport, PopulateState, PrefixMatch
from flowserve.rtc.events import CacheChanges

__all__ = ["RTC", "AuditReport", "CacheChanges", "PopulateState", "PrefixMatch"]
