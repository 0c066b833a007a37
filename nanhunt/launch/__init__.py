"""`nanhunt run`: a script or module of anybody's, run as it is with nanhunt beside it.

`program` runs it as Python would, `arrival` waits until it imports torch, `launching` ties them to
the end of the process. `sentry` stands at the optimizers (`optimizers` tells what their hooks do
not), looks at `gradients`, withholds a step and puts the `buffers` back; `alarm` is the recorder
that it switches on, `caution` keeps our failures from the program. `desk` tells findings, `ledger`
counts and says at the end what was watched and what was not.
"""

from nanhunt.launch.desk import Order
from nanhunt.launch.launching import Launch
from nanhunt.launch.program import Program

__all__ = ["Launch", "Order", "Program"]
