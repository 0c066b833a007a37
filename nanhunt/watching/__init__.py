"""`watch`: a guard around the step of a training loop, for runs in which nobody looks on.

`entrance` takes the arguments, `choices` checks them, `loop` takes the steps and `running` is the
one that it is at. `call` is its closure, `held` what the optimizers hold, `moment` where generators
and buffers stood before, `pulse` the one look at loss and gradients, `verdict` what follows,
`scaling` leads a scaler. A step that is not taken goes to `court`, which makes a `scene` of it, has
an `inquest` held, `keeping` store it, and asks what `previous` step an optimizer spoilt; `doubts`
say why a replay may differ, and `telling` prints. `journal` notes the figures, `clock` whose time
it was, and `drift` how far the parameters moved. `outcome` is what the training is told.
"""

from nanhunt.watching.entrance import watch
from nanhunt.watching.loop import Watch
from nanhunt.watching.outcome import Outcome

__all__ = ["Outcome", "Watch", "watch"]
