"""What to do, as functions over values: `plan(desired, observed, now) -> actions`. No I/O, no clock.

Called by the controllers, which act; the same values describe processes on one machine. A plan is made from
the whole observed state each time, never from what a plan before meant to do, so every step may be lost and
is then planned again. Phases stand in files of their own, in the order of an executor's life:

| phase   | what it decides                                                              |
|---------|------------------------------------------------------------------------------|
| replace | who is dead, and who is to be replaced because he is outdated or silent       |
| roles   | who changes his role instead of leaving                                       |
| claim   | which warm pods become whose                                                  |
| start   | load, role, ready                                                             |
| drain   | who leaves, when he may be deleted                                            |
| pool    | warm pods: made, kept, taken away                                             |
| status  | what is said of it                                                            |
"""

from controlplane.operator.plan.pool import plan_pool
from controlplane.operator.plan.serving import plan_serving

__all__ = ["plan_pool", "plan_serving"]
