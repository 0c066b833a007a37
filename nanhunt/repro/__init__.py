"""The op-level reproduction: a short script that shows one culprit with torch alone.

`reproduction` replays the step and copies the operands of the culprit, `scene` is the call that can
be run from them, `reduction` makes it smaller, `spelling` and `script` write it down, and `folder`
runs it in a clean process before it is handed over.
"""

from nanhunt.repro.folder import check_folder
from nanhunt.repro.reproduction import Target, reproduce

__all__ = ["Target", "check_folder", "reproduce"]
